"""Tests of the allocation of a budget against the best of all plans."""

import itertools
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from spaces import SPACE, space_of, two_limits

from darwinlm.plan import Budget, Plan, parameter_budget, parameter_limit
from darwinlm.search.allocation import cheapest_plan, error_plan, sparing_plans, uniform_plan


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_cheapest_plan_is_best_of_all_plans(data):
    sizes = [
        [*sorted(data.draw(st.sets(st.integers(1, 40), min_size=1, max_size=3)), reverse=True), 0] for _ in range(4)
    ]
    space = space_of(sizes, fixed=7)
    costs = {(i, level): data.draw(st.integers(0, 50)) for i, site in enumerate(sizes) for level in range(len(site))}
    low = data.draw(st.integers(7, 7 + sum(site[0] for site in sizes)))
    budget = Budget(limits=(replace(parameter_limit(space), maximum=low + 5, minimum=low),))
    found = cheapest_plan(space, budget, lambda site, level: costs[site.layer, level])
    every = [
        sum(costs[i, level] for i, level in enumerate(levels))
        for levels in itertools.product(*(range(len(site)) for site in sizes))
        if budget.holds(levels)
    ]
    if not every:
        assert found is None
    else:
        assert found is not None
        assert budget.holds(found.levels)
        assert sum(costs[i, level] for i, level in enumerate(found.levels)) == min(every)


def test_uniform_plan_and_error_plan():
    budget = parameter_budget(0.6, SPACE)
    uniform = uniform_plan(SPACE, budget)
    assert max(uniform.levels[:4]) - min(uniform.levels[:4]) <= 1
    least = error_plan(SPACE, budget)
    assert sum(least.levels[:2]) >= sum(least.levels[4:])


def test_sparing_plans():
    sizes = [[90, 60, 30, 0]] * 64
    space = space_of(sizes)
    space = replace(
        space,
        sites=tuple(
            replace(site, layer=i // 2, kind="mlp" if i % 2 else "attention") for i, site in enumerate(space.sites)
        ),
    )
    budget = parameter_budget(4_660, space)
    plans = sparing_plans(space, budget)
    assert all(budget.holds(plan.levels) for plan in plans)
    assert len(set(plans)) == len(plans) == 12
    assert plans[0] == error_plan(space, budget)
    whole = [{site.layer for site, level in zip(space.sites, plan.levels, strict=True) if level} for plan in plans]
    assert [min(layers) for layers in whole[4:8]] == [2] * 4 and max(max(layers) for layers in whole[4:8]) < 31
    assert [min(layers) for layers in whole[8:]] == [4] * 4 and max(max(layers) for layers in whole[8:]) < 30
    for number, plan in enumerate(plans):
        cut = {site.kind for site, level in zip(space.sites, plan.levels, strict=True) if level}
        assert cut == ({"mlp"} if number % 4 >= 2 else {"attention", "mlp"})
    # With such a small budget, only plans that spare no site remain.
    assert all(len(set(plan.levels)) == 1 for plan in sparing_plans(space, parameter_budget(100, space)))


def test_error_plan_under_two_limits():
    budget = two_limits({"params": 0.7, "kv_cache": 0.5})
    every = [Plan(levels=levels) for levels in itertools.product(range(4), repeat=6) if budget.holds(levels)]
    best = min(sum(s.errors[k] for s, k in zip(SPACE.sites, plan.levels, strict=True)) for plan in every)
    found = error_plan(SPACE, budget)
    assert sum(s.errors[k] for s, k in zip(SPACE.sites, found.levels, strict=True)) <= 1.1 * best
