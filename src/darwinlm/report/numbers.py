"""Formatting of numbers for readers."""


def count(value: int) -> str:
    """Format as 1,234,567."""
    return f"{value:,}"


def short(value: float) -> str:
    """Format as 134.5M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:.1f}{letter}"
    return f"{value:,}"


def percent(share: float) -> str:
    """Format as 59.9%."""
    return f"{100 * share:.1f}%"


def kl(nats: float | None) -> str:
    """Format as 0.876, small values with more digits."""
    if nats is None:
        return "none"
    return f"{nats:.3f}" if abs(nats) >= 0.1 or nats == 0 else f"{nats:.5f}"


def plain(value: float | None) -> str:
    """Format as 1,953 or 41.1."""
    if value is None:
        return "\N{EN DASH}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def fixed(value: float) -> str:
    """Format as 2.345."""
    return f"{value:.3f}"


def signed(value: float) -> str:
    """Format as +0.82."""
    return f"{value:+.2f}"


def signed_percent(share: float) -> str:
    """Format as -4.5%."""
    return f"{100 * share:+.1f}%"


def probability(p: float) -> str:
    """Format as 0.031 or 4.2e-07."""
    return f"{p:.2g}"


def times(factor: float) -> str:
    """Format as 1.66 with a multiplication sign."""
    return f"{factor:.2f}\N{MULTIPLICATION SIGN}"


def duration(seconds: float) -> str:
    """Format as 41.2 s, 5.3 min or 7.9 h."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"


def memory(count_of_bytes: int) -> str:
    """Format as 1.3 GiB."""
    for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count_of_bytes >= 1024**power:
            return f"{count_of_bytes / 1024**power:.1f} {name}"
    return f"{count_of_bytes} bytes"


def model_name(model: str) -> str:
    """Return a Hub id unchanged, and the last part of a path."""
    return model if model.count("/") == 1 and not model.startswith((".", "/")) else model.rstrip("/").split("/")[-1]
