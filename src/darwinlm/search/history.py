"""Reading of an evolution's history, shared by search and report."""

from collections.abc import Mapping, Sequence
from typing import Any

_FORMER = 1e8
"""Version 0.1.0 wrote 1e9 as the KL of a candidate that diverged, or a mean over blocks that contains it."""


def kl_of(stored: float | None) -> float | None:
    """Return a KL, or a difference of two, as stored in a file of the search; None if a candidate diverged."""
    return None if stored is None or stored >= _FORMER else stored


def trials_of(history: Sequence[Mapping[str, Any]]) -> list[dict[str, int]]:
    """Per selection step, over all generations: how many candidates were `tried` (trained) and how many trials
    `helped`."""
    return [
        {name: sum(step[name] for step in steps) for name in ("tried", "helped")}
        for steps in zip(*(entry["trials"] for entry in history), strict=True)
    ]
