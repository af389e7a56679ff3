"""Parsing of targets: a size, the sizes of a family, or limits by resource; and values formatted for messages."""

import difflib
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

RESOURCES = ("params", "active_params", "flops", "kv_cache", "memory", "latency")
"""Resources that a target can limit."""
_MOST = 10**1000
"""Upper bound on parameters or bytes; Python does not print integers with thousands of digits."""


@dataclass(frozen=True)
class SizeTarget:
    """A requested size."""

    name: str
    """As written in the recipe."""
    limits: Mapping[str, float | int]
    """Limits by resource, as returned by `parse_target`."""


def parse_targets(value: float | str) -> tuple[SizeTarget, ...]:
    """Parse the target of a recipe: one size, or the sizes of a family.

    Raises:
        ValueError: if it is not valid, a size is given twice, or a family mixes fractions and numbers of parameters.
    """
    targets = tuple(SizeTarget(str(part), parse_target(part)) for part in split_targets(value))
    if len({target.name for target in targets}) < len(targets):
        raise ValueError(f"target {show(value)}: a size is given twice")
    if len(targets) > 1 and len({type(target.limits["params"]) for target in targets}) > 1:
        raise ValueError(
            f"target {show(value)} mixes fractions and numbers of parameters; give all sizes in the same way"
        )
    return targets


def parse_size(value: float | str) -> float | int:
    """Parse a size: a fraction as float (`0.5`), a number of parameters as int (`2.7B`, `500M`).

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(value, str):
        text = value.strip().replace("_", "")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMBT])", text, re.IGNORECASE)
        if match:
            return _count(Decimal(match[1]) * {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[match[2].upper()])
        try:
            value = float(text)
        except ValueError:
            raise ValueError(not_a_size(value)) from None
    if value >= 1_000 and value % 1 == 0:
        return _count(value)
    return float(value)


def _count(value: float | Decimal) -> int:
    if value >= _MOST:
        raise ValueError("target: too large for a number of parameters or bytes")
    return int(value)


def split_targets(value: float | str) -> list[float | str]:
    """Return the sizes of a family (`0.8,0.6,0.45`), or the single target."""
    if isinstance(value, str) and "," in value and "=" not in value:
        return [part.strip() for part in value.split(",")]
    return [value]


def parse_target(value: float | str) -> dict[str, float | int]:
    """Parse a target as limits by resource; a single size limits `params`.

    `params` and `active_params` (used per token) take a fraction (float) or a count (int), `memory` a fraction or bytes
    (`8GB`); `flops`, `kv_cache` and `latency` take a fraction of the dense model's cost.

    Raises:
        ValueError: if it is not valid.
    """
    if not isinstance(value, str) or "=" not in value:
        return {"params": parse_size(value)}
    limits: dict[str, float | int] = {}
    for part in value.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in RESOURCES:
            near = difflib.get_close_matches(name, RESOURCES, n=1, cutoff=0.0)[0]
            raise ValueError(f"target {show(value)}: unknown resource {name!r}; did you mean {near!r}?")
        if name in limits:
            raise ValueError(f"target {show(value)}: {name} is limited twice")
        in_bytes = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)B", size, re.IGNORECASE) if name == "memory" else None
        if in_bytes:
            base = 1024 if len(in_bytes[2]) == 2 else 1000
            limits[name] = _count(Decimal(in_bytes[1]) * base ** ("KMGT".index(in_bytes[2][0].upper()) + 1))
            continue
        limits[name] = parse_size(size)
        if isinstance(limits[name], int) and name not in ("params", "active_params"):
            known = "a fraction (0.5) or bytes (8GB)" if name == "memory" else "a fraction (0.5) of the dense model's"
            raise ValueError(f"target {show(value)}: {name} takes {known}")
    return limits


def not_a_size(value: object) -> str:
    """Return the error message for a `value` that is not a size."""
    return f"target {show(value)} is neither a fraction of the parameters (0.5) nor a number of them (2.7B, 500M)"


def show(value: object) -> str:
    """Return `value` on one line, truncated if it is long."""
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = 80
    try:
        return shortened.repr(value)
    except ValueError:  # Python does not print integers with thousands of digits.
        return "an integer with thousands of digits"
