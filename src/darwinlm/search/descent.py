"""Downhill by measured slopes, before any training: where the evolution begins.

The database's output errors rank the levels of one site well, but say little about how much the whole model minds. So
each site is moved one level up and one down from a base plan, alone, and the model's KL is measured; the differences
are slopes, valid nearby. The plan that gains most by them within the budget, no site further than one level away, is
found by dynamic programming: dozens of exchanges at once, where an evolution tries them one by one.
"""

import math
from collections.abc import Sequence

from darwinlm.plan import Budget, Plan, SiteLevels, Space
from darwinlm.search.allocation import cheapest_plan


def neighbours(space: Space, base: Plan) -> list[Plan]:
    """Plans that differ from `base` by one level in one site; they need not meet any budget."""
    found = []
    for index, site in enumerate(space.sites):
        for level in (base.levels[index] - 1, base.levels[index] + 1):
            if 0 <= level < len(site.units):
                found.append(Plan(levels=(*base.levels[:index], level, *base.levels[index + 1 :])))
    return found


def steepest(space: Space, budget: Budget, base: Plan, base_score: float, scores: Sequence[float]) -> Plan | None:
    """The plan within `budget`, at most a level from `base` in each site, that the slopes say is best.

    Args:
        space: the search space.
        budget: to be met.
        base: the plan in the middle.
        base_score: its score.
        scores: those of `neighbours(space, base)`, in their order.

    Returns:
        The plan, or None if none meets the budget.
    """
    change: dict[tuple[str, int], float] = {}
    for plan, score in zip(neighbours(space, base), scores, strict=True):
        index = next(i for i, (old, new) in enumerate(zip(base.levels, plan.levels, strict=True)) if old != new)
        change[space.sites[index].name, plan.levels[index]] = score - base_score
    here = {site.name: level for site, level in zip(space.sites, base.levels, strict=True)}

    def cost(site: SiteLevels, level: int) -> float:
        return 0.0 if level == here[site.name] else change.get((site.name, level), math.inf)

    return cheapest_plan(space, budget, cost)
