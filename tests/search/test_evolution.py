"""Tests of the evolution: budgets are met, the best plan is never lost, a resumed search gives the same result."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spaces import SPACE, space_of, two_limits

from darwinlm.config.recipe import SearchRecipe
from darwinlm.errors import UserError
from darwinlm.plan import Budget, Plan, parameter_budget, parameter_limit
from darwinlm.search.allocation import error_plan, uniform_plan
from darwinlm.search.evolution import Evolution, Score
from darwinlm.search.stage import starting_plans

RECIPE = SearchRecipe(generations=5, offspring=5, survivors=(3, 2, 1), trial_tokens=(1, 2, 3), score_tokens=(1, 2, 3))


def score(plan, step=2):
    """Return a deterministic score of the plan, whose minimum is not the starting plan."""
    return sum(
        (site.errors[level] * (1 + i % 3)) for i, (site, level) in enumerate(zip(SPACE.sites, plan.levels, strict=True))
    )


def begin(seed=0, target=0.6):
    budget = parameter_budget(target, SPACE)
    return Evolution(SPACE, budget, RECIPE, [uniform_plan(SPACE, budget)], seed), budget


def run(search):
    asked = []
    while (request := search.ask()) is not None:
        asked.append(request)
        search.tell([Score(score(plan, request.step)) for plan in request.plans])
    return asked


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), target=st.floats(0.3, 0.95))
def test_evolution_plans_within_budget(seed, target):
    budget = parameter_budget(target, SPACE)
    start = uniform_plan(SPACE, budget)
    if start is None:
        return
    search = Evolution(SPACE, budget, RECIPE, [start], seed)
    for request in run(search):
        for plan in request.plans:
            assert budget.holds(plan.levels)


def test_evolution_scores_plans_once_per_step():
    search, _ = begin()
    requests = run(search)
    for step in range(3):
        plans = [plan for request in requests if request.step == step for plan in request.plans]
        assert len(plans) == len(set(plans))
    sizes = [len(request.plans) for request in requests if request.generation == 1]
    assert sizes == [5, 3, 2]


def test_evolution_keeps_best_plan():
    search, _ = begin()
    run(search)
    best = [entry["score"] for entry in search.history]
    assert best == sorted(best, reverse=True)
    assert best[-1] < best[0]
    assert score(search.parent) == best[-1]


@pytest.mark.parametrize("stop_after", range(1, 16))
def test_evolution_resumes_after_any_step(stop_after):
    whole, budget = begin(seed=7)
    run(whole)
    broken, _ = begin(seed=7)
    for _ in range(stop_after):
        request = broken.ask()
        broken.tell([Score(score(plan)) for plan in request.plans])
    resumed = Evolution.resume(SPACE, budget, RECIPE, json.loads(json.dumps(broken.state())))
    run(resumed)
    assert resumed.history == whole.history
    assert resumed.state() == whole.state()


def test_evolution_ends_without_new_plans():
    space = space_of([[10, 0], [10, 0]], fixed=0)
    budget = Budget(limits=(replace(parameter_limit(space), maximum=10, minimum=10),))
    recipe = SearchRecipe(generations=50, offspring=2, survivors=(1,), trial_tokens=(0,), score_tokens=(1,))
    search = Evolution(space, budget, recipe, [Plan(levels=(0, 1))], seed=0)
    while (request := search.ask()) is not None:
        search.tell([Score(float(plan.levels[0])) for plan in request.plans])
    assert search.stop() == "all neighbors of the best plan have been tried"


def test_starting_plans_unreachable_budget_error():
    budget = Budget(limits=(replace(parameter_limit(SPACE), maximum=101, minimum=101),))
    message = r"no plan has 101 to 101 parameters with this database's levels; change target slightly or raise data"
    with pytest.raises(UserError, match=message):
        starting_plans(SPACE, budget)


def test_evolution_costs_improve_offspring():
    budget = parameter_budget(0.6, SPACE)
    start = uniform_plan(SPACE, budget)
    costs = [[score(Plan(levels=tuple(k if j == i else 0 for j in range(6)))) for k in range(4)] for i in range(6)]

    def first_offspring(costs):
        search = Evolution(SPACE, budget, RECIPE, [start], 3, costs)
        search.tell([Score(score(start))])
        return [score(plan) for plan in search.ask().plans]

    assert sum(first_offspring(costs)) < sum(first_offspring(None))


@settings(max_examples=40, deadline=None)
@given(params=st.floats(0.35, 1), kv=st.floats(0.1, 1), seed=st.integers(0, 1000))
def test_evolution_plans_meet_all_limits(params, kv, seed):
    budget = two_limits({"params": params, "kv_cache": kv})
    starts = [plan for plan in (uniform_plan(SPACE, budget), error_plan(SPACE, budget)) if plan is not None]
    assert starts, "the budget allows many plans"
    assert all(budget.holds(plan.levels) for plan in starts)
    search = Evolution(SPACE, budget, RECIPE, starts, seed)
    for request in run(search):
        for plan in request.plans:
            assert SPACE.parameters(plan.levels) <= params * SPACE.dense_parameters
            assert budget.limits[1].cost(plan.levels) <= kv * budget.limits[1].dense


def test_relatives_keep_budget_and_state():
    one, budget = begin(seed=5)
    other, _ = begin(seed=5)
    found = one.relatives(8)
    assert len(set(found)) == 8
    assert all(budget.holds(plan.levels) for plan in found)
    run(one)
    run(other)
    assert one.state() == other.state()
