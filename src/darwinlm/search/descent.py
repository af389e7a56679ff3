"""Downhill by the model's own sensitivities, before any training: where the evolution begins.

The database's output errors rank the levels of one site well, but say little about how much the whole model minds. The
sensitivities around a plan say that, for all levels of all sites at once; the plan that gains most by them within the
budget is found by dynamic programming: dozens of exchanges at once, where an evolution tries them one by one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from darwinlm.plan import Budget, Plan, SiteLevels, Space
from darwinlm.search.allocation import cheapest_plan

STEPS = ((1, 1.0), (1, 1.5), (1, 2.0), (1, 3.0), (2, 1.5), (2, 2.5))
"""How many levels a site may move, and by what the second order is multiplied: more is more cautious, since it stands
for all that grows faster than the first order, the interactions of sites too."""
LONG_STEPS = ((2, 1.0), (3, 1.0), (5, 1.0), (64, 1.0))
"""To another budget."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """By site and level, the change in KL (nats) against the base plan's level, to first and second order."""

    first: Sequence[Sequence[float]]
    second: Sequence[Sequence[float]]
    """Never negative. Expected from this site alone: what changes in several sites do to one another is left out."""

    def costs(self) -> list[list[float]]:
        """Both orders together."""
        return [
            [one + two for one, two in zip(*rows, strict=True)] for rows in zip(self.first, self.second, strict=True)
        ]


def downhill(
    space: Space,
    budget: Budget,
    base: Plan,
    sensitivity: Sensitivity,
    steps: Sequence[tuple[int, float]] = STEPS,
) -> list[Plan]:
    """Plans within `budget` that should be best by `sensitivity` so far from `base`, one a step; none is `base`."""
    number = {site.name: index for index, site in enumerate(space.sites)}
    found = []
    for reach, caution in steps:

        def cost(site: SiteLevels, level: int, reach: int = reach, caution: float = caution) -> float:
            index = number[site.name]
            if abs(level - base.levels[index]) > reach:
                return math.inf
            return sensitivity.first[index][level] + caution * sensitivity.second[index][level]

        found.append(cheapest_plan(space, budget, cost))
    return [plan for plan in dict.fromkeys(found) if plan is not None and plan != base]
