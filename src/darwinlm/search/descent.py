"""Greedy initialization of the evolution from a second-order (Fisher) expansion of the KL, without training.

The database's output errors rank the levels of one site well, but say little about their effect on the whole model.
Sensitivities around a plan estimate that effect for all levels of all sites at once; dynamic programming finds the plan
within the budget that gains most by them: dozens of exchanges at once, which an evolution tries one by one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from darwinlm.plan import Budget, Plan, SiteLevels, Space
from darwinlm.search.allocation import cheapest_plan

STEPS = ((1, 1.0), (1, 1.5), (1, 2.0), (1, 3.0), (2, 1.5), (2, 2.5))
"""Maximum number of levels that a site moves, and the factor of the second-order term. A larger factor is more
cautious: the term also stands for all higher orders, including the interactions of sites."""
LONG_STEPS = ((2, 1.0), (3, 1.0), (5, 1.0), (64, 1.0))
"""Steps for a change of budget."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Change in KL (nats) relative to the base plan's level, by site and level, to first and second order."""

    first: Sequence[Sequence[float]]
    second: Sequence[Sequence[float]]
    """Second-order term, never negative, for each site alone; interactions between sites are ignored."""

    def costs(self) -> list[list[float]]:
        """Return the sum of both orders, by site and level."""
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
    """Return the best plans within `budget` by `sensitivity`, one for each of `steps` around `base`, without `base`
    itself."""
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
