"""Exact allocation of a budget: the plan of minimum total cost, by dynamic programming (multiple-choice knapsack)."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from darwinlm.plan import Budget, Limit, Plan, SiteKind, SiteLevels, Space

_SPARED_SHARES = (0.0, 1 / 16, 1 / 8)
"""Fractions of the layers kept dense at the start of the model; half as many are kept dense at the end."""
_MOST_CELLS = 1 << 21
_FEW_CELLS = 1 << 14
"""Number of cells where many problems are solved in sequence."""
_PRICE_STEPS = 48
_FIRST_FACTOR, _SLOWER = 4.0, 0.9
"""Factor by which a price is multiplied or divided, and the decay of this factor."""


def cheapest_plan(space: Space, budget: Budget, cost: Callable[[SiteLevels, int], float]) -> Plan | None:
    """Return the plan within `budget` that minimizes the sum of `cost(site, level)` over sites.

    With one limit the result is exact: costs are counted in units of their greatest common divisor; only if that needs
    more than two million cells are they rounded (up, so that the maximum holds), and the plan is optimal for the
    rounded problem. With several limits, the first is handled in this way and the others by prices (Lagrange
    multipliers) on their costs, raised until they hold: the plan is then within the budget, and optimal for these
    prices.

    Returns:
        The plan, or None if none was found.
    """
    table = [np.array([cost(site, level) for level in range(len(site.units))]) for site in space.sites]
    first, *others = budget.limits
    if not others:
        return _cheapest(table, first, budget, _MOST_CELLS)
    finite = np.concatenate([row[np.isfinite(row)] for row in table])
    # A site costs about 1 / sites of a limit: at this price, a limit adds a thousandth of the spread of the costs.
    lowest = max(1e-3 * len(table) * float(np.ptp(finite)), 1e-12)
    prices, factor = np.zeros(len(others)), _FIRST_FACTOR
    found: Plan | None = None
    for _ in range(_PRICE_STEPS):
        priced = [
            row + sum(
                price * np.array(limit.costs[index]) / max(1, limit.maximum)
                for price, limit in zip(prices, others, strict=True)
            )
            for index, row in enumerate(table)
        ]  # fmt: skip
        plan = _cheapest(priced, first, Budget(limits=(first,)), _FEW_CELLS)
        if plan is None:
            return found
        over = np.array([limit.cost(plan.levels) > limit.maximum for limit in others])
        if not over.any() and (found is None or _total(table, plan) < _total(table, found)):
            found = plan
        # Raise prices of exceeded limits and lower the others, in smaller steps once all limits hold.
        prices = np.where(over, np.maximum(prices * factor, lowest), prices / factor)
        if found is not None:
            factor = 1 + _SLOWER * (factor - 1)
    return found


def _total(table: Sequence[np.ndarray], plan: Plan) -> float:
    return float(sum(row[level] for row, level in zip(table, plan.levels, strict=True)))


def _cheapest(table: Sequence[np.ndarray], limit: Limit, budget: Budget, most_cells: int) -> Plan | None:
    """Solve for one limit by dynamic programming; `table` holds the cost to minimize, by site and level."""
    room = limit.maximum - limit.fixed
    unit = math.gcd(*(size for site in limit.costs for size in site)) or 1
    unit = max(unit, -(-room // most_cells))
    capacity = room // unit
    if capacity < 0:
        return None
    weights = [[-(-size // unit) for size in site] for site in limit.costs]

    best = np.full(capacity + 1, np.inf)
    best[0] = 0.0
    choices = np.zeros((len(weights), capacity + 1), dtype=np.int8)
    for index, (costs, site_weights) in enumerate(zip(table, weights, strict=True)):
        following = np.full(capacity + 1, np.inf)
        for level, weight in enumerate(site_weights):
            if weight > capacity:
                continue
            candidate = best[: capacity + 1 - weight] + costs[level]
            better = candidate < following[weight:]
            following[weight:][better] = candidate[better]
            choices[index, weight:][better] = level
        best = following

    for cell in _by_cost(best, limit, unit):
        levels = _trace(choices, weights, cell)
        if budget.holds(levels):
            return Plan(levels=levels)
    return None


def uniform_plan(space: Space, budget: Budget) -> Plan | None:
    """Return the plan within `budget` whose sites all keep as nearly the same fraction of their parameters as possible.

    With several limits, or with sites that a limit does not affect, a site's fraction is the minimum over its limits.
    """
    fractions = [1.0] * len(space.sites)
    for limit in budget.limits:
        fraction = (limit.maximum - limit.fixed) / max(1, limit.uncut - limit.fixed)
        for index, costs in enumerate(limit.costs):
            if costs[0] > 0:
                fractions[index] = min(fractions[index], fraction)
    goal = {site.name: fraction for site, fraction in zip(space.sites, fractions, strict=True)}
    return cheapest_plan(space, budget, lambda site, level: _unevenness(site, level, goal[site.name]))


def sparing_plans(space: Space, budget: Budget) -> list[Plan]:
    """Return different plans that keep some sites dense: the first and last layers, or none; attention, or none.

    Output errors do not reflect that errors of the last layers go directly into the logits, and errors of the first
    layers through all others. LLM-Pruner (arXiv 2305.11627) keeps 4 of 32 layers dense at the start and 2 at the end.
    For the remaining sites, both the plan of least output error and the most uniform plan are returned.
    """
    layers = 1 + max(site.layer for site in space.sites)
    found = []
    for share, attention_too, even in itertools.product(_SPARED_SHARES, (True, False), (False, True)):
        first, last = math.ceil(share * layers), layers - math.ceil(share / 2 * layers)

        def cost(
            site: SiteLevels, level: int, first: int = first, last: int = last, whole: bool = not attention_too,
            even: bool = even,
        ) -> float:  # fmt: skip
            if level > 0 and (not first <= site.layer < last or (whole and site.kind == "attention")):
                return math.inf
            return _unevenness(site, level, 1.0) if even else site.errors[level]

        found.append(cheapest_plan(space, budget, cost))
    return [plan for plan in dict.fromkeys(found) if plan is not None]


def _unevenness(site: SiteLevels, level: int, fraction: float) -> float:
    return site.parameters[0] * (site.parameters[level] / site.parameters[0] - fraction) ** 2


def even_plans(space: Space, budget: Budget) -> list[Plan]:
    """Return plans that remove some whole layers, or none, and use one level per kind of site in all other layers: one
    for attention, one for experts, and one for MLPs without experts.

    Layers are removed in the order of the database's total error of their sites. For each number of removed layers,
    these are all plans within the maxima in which no kind can grow; once the other layers can stay dense, no more are
    removed. The list is empty if even the smallest plan is too large.
    """
    kinds = list(dict.fromkeys(map(_sizes, space.sites)))
    found: list[Plan] = []
    for count in range(len(order := _removable_layers(space)) + 1):
        gone = set(order[:count])

        def plan(levels: Sequence[int], gone: set[int] = gone) -> Plan:
            kept = dict(zip(kinds, levels, strict=True))
            return Plan(
                levels=tuple(len(site.units) - 1 if site.layer in gone else kept[_sizes(site)] for site in space.sites)
            )

        def fits(levels: Sequence[int], plan: Callable[[Sequence[int]], Plan] = plan) -> bool:
            chosen = plan(levels).levels
            return min(levels) >= 0 and all(limit.cost(chosen) <= limit.maximum for limit in budget.limits)

        found += [
            plan(levels)
            for levels in itertools.product(*(range(len(sizes)) for _, sizes in kinds))
            if fits(levels) and not any(map(fits, _one_larger(levels)))
        ]
        if fits([0] * len(kinds)):
            break
    return found


def _one_larger(levels: Sequence[int]) -> Iterator[list[int]]:
    return ([n - (i == kind) for i, n in enumerate(levels)] for kind in range(len(levels)))


def _sizes(site: SiteLevels) -> tuple[SiteKind, tuple[int, ...]]:
    """Return what sites of one kind have in common, ignoring whether they can be removed completely."""
    return site.kind, tuple(count for count in site.units if count)


def _removable_layers(space: Space) -> list[int]:
    """Return layers whose sites can all be removed, least total error first, leaving at least one layer.

    A layer with a single site also has linear attention, which is not pruned, so the layer cannot be removed.
    """
    errors: dict[int, float] = {}
    sites = Counter(site.layer for site in space.sites)
    for site in space.sites:
        removable = site.units[-1] == 0 and sites[site.layer] > 1
        errors[site.layer] = errors.get(site.layer, 0.0) + (site.errors[-1] if removable else math.inf)
    order = sorted(errors, key=errors.__getitem__)
    return [layer for layer in order[:-1] if errors[layer] < math.inf]


def error_plan(space: Space, budget: Budget) -> Plan | None:
    """Return the plan within `budget` of least total relative output error, as measured per site in the database."""
    return cheapest_plan(space, budget, lambda site, level: site.errors[level])


def _by_cost(best: np.ndarray, limit: Limit, unit: int) -> Sequence[int]:
    """Return reachable cells within the limit, cheapest first. Rounding can overestimate the cost of a cell."""
    first = max(0, (limit.minimum - limit.fixed) // unit)
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
