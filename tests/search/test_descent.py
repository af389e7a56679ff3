"""Tests of the descent against the best of all plans within reach."""

import itertools

import pytest
from spaces import SPACE

from darwinlm.plan import parameter_budget
from darwinlm.search.allocation import uniform_plan
from darwinlm.search.descent import Sensitivity, downhill


def sensitivity_around(base):
    """Return first orders with improvements, and second orders that penalize long moves, different in each site."""
    first = [[(3 + i) * (level - here) for level in range(4)] for i, here in enumerate(base.levels)]
    second = [[(1 + i % 3) * (level - here) ** 2 for level in range(4)] for i, here in enumerate(base.levels)]
    return Sensitivity(first, second)


@pytest.mark.parametrize("target", [0.5, 0.6, 0.7])
def test_downhill_plans_are_best_within_reach(target):
    budget = parameter_budget(target, SPACE)
    base = uniform_plan(SPACE, budget)
    sensitivity = sensitivity_around(base)

    def best(reach, caution):
        choices = [[k for k in range(4) if abs(k - level) <= reach] for level in base.levels]
        return min(
            sum(sensitivity.first[i][k] + caution * sensitivity.second[i][k] for i, k in enumerate(levels))
            for levels in itertools.product(*choices)
            if budget.holds(levels)
        )

    def worth(plan, caution):
        return sum(sensitivity.first[i][k] + caution * sensitivity.second[i][k] for i, k in enumerate(plan.levels))

    found = downhill(SPACE, budget, base, sensitivity)
    assert base not in found and len(set(found)) == len(found)
    assert all(budget.holds(plan.levels) for plan in found)
    for reach, caution in [(1, 1.0), (2, 2.0)]:
        assert min(worth(plan, caution) for plan in [base, *found]) <= best(reach, caution)


def test_downhill_without_improvement_is_empty():
    budget = parameter_budget(0.6, SPACE)
    base = uniform_plan(SPACE, budget)
    flat = [[0.0] * 4 for _ in base.levels]
    uphill = [[float(level != here) for level in range(4)] for here in base.levels]
    assert downhill(SPACE, budget, base, Sensitivity(flat, uphill)) == []
