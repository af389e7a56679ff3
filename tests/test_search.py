"""Search and allocation: budgets hold, the best is never lost, a resumed search is the uninterrupted one."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darwinlm.errors import UserError
from darwinlm.plan import Budget, Plan, SiteLevels, Space, parameter_budget
from darwinlm.recipe import SearchRecipe
from darwinlm.search.allocation import cheapest_plan, error_plan, uniform_plan
from darwinlm.search.descent import neighbours, steepest
from darwinlm.search.evolution import Evolution


def space_of(sizes, fixed=100):
    """Sites with the given parameters a level; errors grow with what is gone, differently in each site."""
    return Space(
        sites=tuple(
            SiteLevels(
                name=f"layers.{i}.mlp",
                layer=i,
                kind="mlp",
                units=tuple(range(len(levels) - 1, -1, -1)),
                parameters=tuple(levels),
                kv_elements=tuple(0 for _ in levels),
                errors=tuple((1 + i) * (levels[0] - size) ** 2 / levels[0] for size in levels),
            )
            for i, levels in enumerate(sizes)
        ),
        fixed_parameters=fixed,
    )


SPACE = space_of([[90, 60, 30, 0]] * 4 + [[80, 50, 40, 0]] * 2)
RECIPE = SearchRecipe(generations=5, offspring=5, survivors=(3, 2, 1), trial_tokens=(1, 2, 3), score_tokens=(1, 2, 3))


def score(plan, step=2):
    """Any deterministic function of the plan; its minimum is not where the search starts."""
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
        search.tell([score(plan, request.step) for plan in request.plans])
    return asked


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), target=st.floats(0.3, 0.95))
def test_every_plan_asked_for_is_within_the_budget(seed, target):
    budget = parameter_budget(target, SPACE)
    start = uniform_plan(SPACE, budget)
    if start is None:
        return
    search = Evolution(SPACE, budget, RECIPE, [start], seed)
    for request in run(search):
        for plan in request.plans:
            assert budget.holds(SPACE.parameters(plan.levels))


def test_a_plan_is_scored_once_a_step_and_only_survivors_go_on():
    search, _ = begin()
    requests = run(search)
    for step in range(3):
        plans = [plan for request in requests if request.step == step for plan in request.plans]
        assert len(plans) == len(set(plans))
    sizes = [len(request.plans) for request in requests if request.generation == 1]
    assert sizes == [5, 3, 2]


def test_the_best_plan_is_never_lost_and_gets_better():
    search, _ = begin()
    run(search)
    best = [entry["score"] for entry in search.history]
    assert best == sorted(best, reverse=True)
    assert best[-1] < best[0]
    assert score(search.parent) == best[-1]


@pytest.mark.parametrize("stop_after", range(1, 16))
def test_resuming_after_any_step_changes_nothing(stop_after):
    whole, budget = begin(seed=7)
    run(whole)
    broken, _ = begin(seed=7)
    for _ in range(stop_after):
        request = broken.ask()
        broken.tell([score(plan) for plan in request.plans])
    resumed = Evolution.resume(SPACE, budget, RECIPE, json.loads(json.dumps(broken.state())))
    run(resumed)
    assert resumed.history == whole.history
    assert resumed.state() == whole.state()


def test_a_search_with_nothing_left_to_try_ends():
    space = space_of([[10, 0], [10, 0]], fixed=0)
    budget = Budget(maximum=10, minimum=10)
    recipe = SearchRecipe(generations=50, offspring=2, survivors=(1,), trial_tokens=(0,), score_tokens=(1,))
    search = Evolution(space, budget, recipe, [Plan(levels=(0, 1))], seed=0)
    while (request := search.ask()) is not None:
        search.tell([float(plan.levels[0]) for plan in request.plans])
    assert search.stop() == "every neighbour of the best plan has been tried"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_allocation_is_the_best_of_all_plans(data):
    sizes = [
        [*sorted(data.draw(st.sets(st.integers(1, 40), min_size=1, max_size=3)), reverse=True), 0] for _ in range(4)
    ]
    space = space_of(sizes, fixed=7)
    costs = {(i, level): data.draw(st.integers(0, 50)) for i, site in enumerate(sizes) for level in range(len(site))}
    low = data.draw(st.integers(7, 7 + sum(site[0] for site in sizes)))
    budget = Budget(maximum=low + 5, minimum=low)
    found = cheapest_plan(space, budget, lambda site, level: costs[site.layer, level])
    every = [
        sum(costs[i, level] for i, level in enumerate(levels))
        for levels in itertools.product(*(range(len(site)) for site in sizes))
        if budget.holds(space.parameters(levels))
    ]
    if not every:
        assert found is None
    else:
        assert found is not None
        assert budget.holds(space.parameters(found.levels))
        assert sum(costs[i, level] for i, level in enumerate(found.levels)) == min(every)


def test_uniform_is_even_and_least_error_spares_the_sensitive():
    budget = parameter_budget(0.6, SPACE)
    uniform = uniform_plan(SPACE, budget)
    assert max(uniform.levels[:4]) - min(uniform.levels[:4]) <= 1
    least = error_plan(SPACE, budget)
    assert sum(least.levels[:2]) >= sum(least.levels[4:])


def additive(plan):
    """A score without interactions, in which the cheapest plan by slopes is the best one within a level."""
    return sum(
        (3 + i) ** 2 * site.errors[level] for i, (site, level) in enumerate(zip(SPACE.sites, plan.levels, strict=True))
    )


def test_the_steepest_step_is_the_best_plan_within_a_level_of_the_base():
    budget = parameter_budget(0.6, SPACE)
    base = uniform_plan(SPACE, budget)
    near = neighbours(SPACE, base)
    assert all(sum(a != b for a, b in zip(plan.levels, base.levels, strict=True)) == 1 for plan in near)
    assert len(set(near)) == len(near)
    found = steepest(SPACE, budget, base, additive(base), [additive(plan) for plan in near])
    choices = [[k for k in range(4) if abs(k - level) <= 1] for level in base.levels]
    within = [Plan(levels=levels) for levels in itertools.product(*choices)]
    best = min(additive(plan) for plan in within if budget.holds(SPACE.parameters(plan.levels)))
    assert additive(found) == pytest.approx(best)
    assert budget.holds(SPACE.parameters(found.levels))


def test_where_every_step_is_uphill_the_base_stays():
    budget = parameter_budget(0.6, SPACE)
    base = uniform_plan(SPACE, budget)
    assert steepest(SPACE, budget, base, 0.0, [1.0 for _ in neighbours(SPACE, base)]) == base


def test_a_target_out_of_reach_is_refused_with_what_can_be_met():
    dense, smallest = SPACE.dense_parameters, SPACE.fixed_parameters
    with pytest.raises(
        UserError, match=rf"the smallest target that can be met is {-(-smallest * 10_000 // dense) / 1e4}"
    ):
        parameter_budget(0.01, SPACE)
    with pytest.raises(UserError, match="dense model has only"):
        parameter_budget(dense + 1, SPACE)
    assert parameter_budget(dense, SPACE).maximum == dense


def test_plans_survive_json_and_refuse_what_does_not_fit():
    plan = Plan(levels=(0, 1, 2, 3, 1, 2))
    payload = json.loads(json.dumps(plan.to_dict(SPACE)))
    assert Plan.from_dict(payload, SPACE) == plan
    assert payload["parameters"] == SPACE.parameters(plan.levels)
    for broken, message in [
        ({**payload, "format": 9}, "expected format 1"),
        ({**payload, "levels": {**payload["levels"], "layers.9.mlp": 0}}, "'layers.9.mlp' is in one of them only"),
        ({**payload, "levels": {**payload["levels"], "layers.0.mlp": 7}}, "level 7; it must be 0 to 3"),
        ({**payload, "levels": {**payload["levels"], "layers.0.mlp": True}}, "level True"),
    ]:
        with pytest.raises(UserError, match=message):
            Plan.from_dict(broken, SPACE)
