"""Numbers as a reader sees them."""


def count(value: int) -> str:
    """1,234,567"""
    return f"{value:,}"


def short(value: float) -> str:
    """134.5M"""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:.1f}{letter}"
    return f"{value:,}"


def percent(share: float) -> str:
    """59.9%"""
    return f"{100 * share:.1f}%"


def kl(nats: float | None) -> str:
    """0.876, small ones with more digits"""
    if nats is None:
        return "none"
    return f"{nats:.3f}" if abs(nats) >= 0.1 or nats == 0 else f"{nats:.5f}"


def plain(value: float | None) -> str:
    """1,953 and 41.1"""
    if value is None:
        return "\N{EN DASH}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def fixed(value: float) -> str:
    """2.345"""
    return f"{value:.3f}"


def signed(value: float) -> str:
    """+0.82"""
    return f"{value:+.2f}"


def signed_percent(share: float) -> str:
    """-4.5%"""
    return f"{100 * share:+.1f}%"


def probability(p: float) -> str:
    """0.031, 4.2e-07"""
    return f"{p:.2g}"


def times(factor: float) -> str:
    """1.66 and a sign of multiplication"""
    return f"{factor:.2f}\N{MULTIPLICATION SIGN}"


def duration(seconds: float) -> str:
    """41.2 s, 5.3 min, 7.9 h"""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"


def memory(count_of_bytes: int) -> str:
    """1.3 GiB"""
    for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count_of_bytes >= 1024**power:
            return f"{count_of_bytes / 1024**power:.1f} {name}"
    return f"{count_of_bytes} bytes"


def model_name(model: str) -> str:
    """A Hub id as it is, of a path its last part."""
    return model if model.count("/") == 1 and not model.startswith((".", "/")) else model.rstrip("/").split("/")[-1]
