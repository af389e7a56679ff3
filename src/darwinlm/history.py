"""Statistics of an evolution's history, shared by search and report."""

from collections.abc import Mapping, Sequence
from typing import Any


def trials_of(history: Sequence[Mapping[str, Any]]) -> list[dict[str, int]]:
    """Per selection step, over all generations: how many candidates were `tried` (trained) and how many trials
    `helped`."""
    return [
        {name: sum(step[name] for step in steps) for name in ("tried", "helped")}
        for steps in zip(*(entry["trials"] for entry in history), strict=True)
    ]
