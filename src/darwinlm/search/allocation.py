"""Exact allocation of a budget: the plan of least total cost, by dynamic programming (multiple-choice knapsack)."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from darwinlm.plan import Budget, Plan, SiteLevels, Space

_MOST_CELLS = 1 << 21


def cheapest_plan(space: Space, budget: Budget, cost: Callable[[SiteLevels, int], float]) -> Plan | None:
    """The plan within `budget` that minimises the sum of `cost(site, level)` over sites.

    Parameters are counted in their greatest common divisor, exactly; only where that needs more than two million cells
    are they rounded (up, so that the maximum holds), and the plan is then the best of the rounded problem.

    Returns:
        The plan, or None if no plan meets the budget.
    """
    sizes = [site.parameters for site in space.sites]
    room = budget.maximum - space.fixed_parameters
    unit = math.gcd(*(size for site in sizes for size in site)) or 1
    unit = max(unit, -(-room // _MOST_CELLS))
    capacity = room // unit
    if capacity < 0:
        return None
    weights = [[-(-size // unit) for size in site] for site in sizes]

    best = np.full(capacity + 1, np.inf)
    best[0] = 0.0
    choices = np.zeros((len(sizes), capacity + 1), dtype=np.int8)
    for index, (site, site_weights) in enumerate(zip(space.sites, weights, strict=True)):
        following = np.full(capacity + 1, np.inf)
        for level, weight in enumerate(site_weights):
            if weight > capacity:
                continue
            candidate = best[: capacity + 1 - weight] + cost(site, level)
            better = candidate < following[weight:]
            following[weight:][better] = candidate[better]
            choices[index, weight:][better] = level
        best = following

    for cell in _by_cost(best, budget, space.fixed_parameters, unit):
        levels = _trace(choices, weights, cell)
        if budget.holds(space.parameters(levels)):
            return Plan(levels=levels)
    return None


def uniform_plan(space: Space, budget: Budget) -> Plan | None:
    """The plan within `budget` whose sites all keep as nearly the same fraction of their parameters as can be."""
    dense = sum(site.parameters[0] for site in space.sites)
    fraction = (budget.maximum - space.fixed_parameters) / dense

    def unevenness(site: SiteLevels, level: int) -> float:
        return site.parameters[0] * (site.parameters[level] / site.parameters[0] - fraction) ** 2

    return cheapest_plan(space, budget, unevenness)


def error_plan(space: Space, budget: Budget) -> Plan | None:
    """The plan within `budget` of least total relative output error, as the database measured it site by site."""
    return cheapest_plan(space, budget, lambda site, level: site.errors[level])


def _by_cost(best: np.ndarray, budget: Budget, fixed: int, unit: int) -> Sequence[int]:
    """Reachable cells within the budget, cheapest first. Rounded cells may hold a little less than they say."""
    first = max(0, (budget.minimum - fixed) // unit)
    cells = np.arange(first, len(best))
    cells = cells[np.isfinite(best[cells])]
    order: list[int] = cells[np.argsort(best[cells], kind="stable")].tolist()
    return order


def _trace(choices: np.ndarray, weights: list[list[int]], cell: int) -> tuple[int, ...]:
    levels: list[int] = []
    for index in range(len(weights) - 1, -1, -1):
        level = int(choices[index, cell])
        levels.append(level)
        cell -= weights[index][level]
    return tuple(reversed(levels))
