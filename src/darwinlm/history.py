"""What the history of an evolution says, to those who search and to those who report."""

from collections.abc import Mapping, Sequence
from typing import Any


def trials_of(history: Sequence[Mapping[str, Any]]) -> list[dict[str, int]]:
    """By step, over all generations: how many candidates were `tried`, trained, and how many it `helped`."""
    return [
        {name: sum(step[name] for step in steps) for name in ("tried", "helped")}
        for steps in zip(*(entry["trials"] for entry in history), strict=True)
    ]
