"""Search and allocation: budgets hold, the best is never lost, a resumed search is the uninterrupted one."""

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darwinlm.config.recipe import SearchRecipe
from darwinlm.errors import UserError
from darwinlm.plan import Budget, Limit, Plan, SiteLevels, Space, make_budget, parameter_budget, parameter_limit
from darwinlm.search.allocation import cheapest_plan, error_plan, sparing_plans, uniform_plan
from darwinlm.search.descent import Sensitivity, downhill
from darwinlm.search.evolution import Evolution, Score
from darwinlm.search.forecast import spearman
from darwinlm.search.stage import starting_plans


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
        search.tell([Score(score(plan, request.step)) for plan in request.plans])
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
            assert budget.holds(plan.levels)


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
        broken.tell([Score(score(plan)) for plan in request.plans])
    resumed = Evolution.resume(SPACE, budget, RECIPE, json.loads(json.dumps(broken.state())))
    run(resumed)
    assert resumed.history == whole.history
    assert resumed.state() == whole.state()


def test_a_search_with_nothing_left_to_try_ends():
    space = space_of([[10, 0], [10, 0]], fixed=0)
    budget = Budget(limits=(replace(parameter_limit(space), maximum=10, minimum=10),))
    recipe = SearchRecipe(generations=50, offspring=2, survivors=(1,), trial_tokens=(0,), score_tokens=(1,))
    search = Evolution(space, budget, recipe, [Plan(levels=(0, 1))], seed=0)
    while (request := search.ask()) is not None:
        search.tell([Score(float(plan.levels[0])) for plan in request.plans])
    assert search.stop() == "all neighbors of the best plan have been tried"


def test_a_budget_that_no_plan_meets_is_one_line():
    budget = Budget(limits=(replace(parameter_limit(SPACE), maximum=101, minimum=101),))
    message = r"no plan has 101 to 101 parameters with this database's levels; change target slightly or raise data"
    with pytest.raises(UserError, match=message):
        starting_plans(SPACE, budget)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_allocation_is_the_best_of_all_plans(data):
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


def test_uniform_is_even_and_least_error_spares_the_sensitive():
    budget = parameter_budget(0.6, SPACE)
    uniform = uniform_plan(SPACE, budget)
    assert max(uniform.levels[:4]) - min(uniform.levels[:4]) <= 1
    least = error_plan(SPACE, budget)
    assert sum(least.levels[:2]) >= sum(least.levels[4:])


def test_plans_that_spare_the_ends_or_attention():
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
    # Where so little may be left that nothing can be spared, only the plans remain that spare nothing.
    assert all(len(set(plan.levels)) == 1 for plan in sparing_plans(space, parameter_budget(100, space)))


def sensitivity_around(base):
    """A first order that is worth following and a second that punishes long moves, different in each site."""
    first = [[(3 + i) * (level - here) for level in range(4)] for i, here in enumerate(base.levels)]
    second = [[(1 + i % 3) * (level - here) ** 2 for level in range(4)] for i, here in enumerate(base.levels)]
    return Sensitivity(first, second)


@pytest.mark.parametrize("target", [0.5, 0.6, 0.7])
def test_downhill_plans_are_the_best_within_reach_of_the_base(target):
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


def test_where_every_step_is_uphill_there_is_nowhere_to_go():
    budget = parameter_budget(0.6, SPACE)
    base = uniform_plan(SPACE, budget)
    flat = [[0.0] * 4 for _ in base.levels]
    uphill = [[float(level != here) for level in range(4)] for here in base.levels]
    assert downhill(SPACE, budget, base, Sensitivity(flat, uphill)) == []


def test_known_costs_draw_better_offspring():
    budget = parameter_budget(0.6, SPACE)
    start = uniform_plan(SPACE, budget)
    costs = [[score(Plan(levels=tuple(k if j == i else 0 for j in range(6)))) for k in range(4)] for i in range(6)]

    def first_offspring(costs):
        search = Evolution(SPACE, budget, RECIPE, [start], 3, costs)
        search.tell([Score(score(start))])
        return [score(plan) for plan in search.ask().plans]

    assert sum(first_offspring(costs)) < sum(first_offspring(None))


def two_limits(target):
    """Parameters, and a resource that the last sites take most of."""
    other = Limit(
        name="kv_cache",
        unit="bytes a token",
        fixed=3,
        costs=tuple(
            tuple((i * i + 1) * len(site.units) * (3 - k) for k in range(4)) for i, site in enumerate(SPACE.sites)
        ),
        maximum=0,
    )
    return make_budget(target, {"params": parameter_limit(SPACE), "kv_cache": other})


@settings(max_examples=40, deadline=None)
@given(params=st.floats(0.35, 1), kv=st.floats(0.1, 1), seed=st.integers(0, 1000))
def test_every_limit_of_a_budget_holds_for_every_plan(params, kv, seed):
    budget = two_limits({"params": params, "kv_cache": kv})
    starts = [plan for plan in (uniform_plan(SPACE, budget), error_plan(SPACE, budget)) if plan is not None]
    assert starts, "there is room for many plans here"
    assert all(budget.holds(plan.levels) for plan in starts)
    search = Evolution(SPACE, budget, RECIPE, starts, seed)
    for request in run(search):
        for plan in request.plans:
            assert SPACE.parameters(plan.levels) <= params * SPACE.dense_parameters
            assert budget.limits[1].cost(plan.levels) <= kv * budget.limits[1].dense


def test_prices_find_nearly_the_best_plan_under_two_limits():
    budget = two_limits({"params": 0.7, "kv_cache": 0.5})
    every = [Plan(levels=levels) for levels in itertools.product(range(4), repeat=6) if budget.holds(levels)]
    best = min(sum(s.errors[k] for s, k in zip(SPACE.sites, plan.levels, strict=True)) for plan in every)
    found = error_plan(SPACE, budget)
    assert sum(s.errors[k] for s, k in zip(SPACE.sites, found.levels, strict=True)) <= 1.1 * best


def test_only_a_lone_limit_must_be_used_up():
    lone, both = two_limits({"kv_cache": 0.5}), two_limits({"kv_cache": 0.5, "params": 0.9})
    assert lone.limits[0].minimum > 0
    assert [limit.minimum for limit in both.limits] == [0, 0]
    with pytest.raises(UserError, match=r"target kv_cache=0.001 is .* bytes a token"):
        two_limits({"kv_cache": 0.001})


def test_relatives_keep_the_budget_and_leave_the_search_as_it_was():
    one, budget = begin(seed=5)
    other, _ = begin(seed=5)
    found = one.relatives(8)
    assert len(set(found)) == 8
    assert all(budget.holds(plan.levels) for plan in found)
    run(one)
    run(other)
    assert one.state() == other.state()


@pytest.mark.parametrize(
    ("ones", "others", "rho"),
    [
        ([1, 2, 3, 4, 5], [10, 20, 30, 40, 50], 1.0),
        ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),
        # Ties share their mean rank: 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
        ([0.1, 0.7, 0.7, 0.9], [1, 2, 3, 4], 4.5 / (4.5 * 5) ** 0.5),
        ([3, 3, 3, 3], [1, 2, 3, 4], 0.0),
    ],
)
def test_spearman_is_the_correlation_of_ranks(ones, others, rho):
    found = spearman(ones, others)
    assert found.rho == pytest.approx(rho)
    assert -1 <= found.low <= found.rho + 1e-5 and found.rho - 1e-5 <= found.high <= 1


def test_more_plans_make_the_interval_of_a_rank_correlation_narrower():
    def width(count):
        found = spearman(range(count), [x ^ 1 for x in range(count)])
        return found.high - found.low

    assert width(3) == 2 and width(6) > width(12) > width(40)


def test_a_target_out_of_reach_is_refused_with_what_can_be_met():
    dense, smallest = SPACE.dense_parameters, SPACE.fixed_parameters
    with pytest.raises(UserError, match=rf"the smallest possible target is {-(-smallest * 10_000 // dense) / 1e4}"):
        parameter_budget(0.01, SPACE)
    with pytest.raises(UserError, match="dense model has only"):
        parameter_budget(dense + 1, SPACE)
    assert parameter_budget(dense, SPACE).limits[0].maximum == dense


def test_plans_survive_json_and_refuse_what_does_not_fit():
    plan = Plan(levels=(0, 1, 2, 3, 1, 2))
    payload = json.loads(json.dumps(plan.to_dict(SPACE)))
    assert Plan.from_dict(payload, SPACE) == plan
    assert payload["parameters"] == SPACE.parameters(plan.levels)
    for broken, message in [
        ({**payload, "format": 9}, "expected format 1"),
        ({**payload, "levels": {**payload["levels"], "layers.9.mlp": 0}}, "'layers.9.mlp' is in only one of them"),
        ({**payload, "levels": {**payload["levels"], "layers.0.mlp": 7}}, "level 7; must be 0 to 3"),
        ({**payload, "levels": {**payload["levels"], "layers.0.mlp": True}}, "level True"),
    ]:
        with pytest.raises(UserError, match=message):
            Plan.from_dict(broken, SPACE)
