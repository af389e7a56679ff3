"""Tests of targets, budgets and plans as data."""

import json

import pytest
from spaces import SPACE, two_limits

from darwinlm.errors import UserError
from darwinlm.plan import Plan, check_target, parameter_budget


@pytest.mark.parametrize(
    ("smallest", "dense"), [(29, 100), (58, 100), (57, 1_000), (24_912, 72_192), (1, 3), (99, 100)]
)
def test_check_target_accepts_smallest_named_target(smallest, dense):
    with pytest.raises(UserError) as caught:
        check_target("params", smallest - 1, dense, smallest)
    named = float(str(caught.value).rsplit(" ", 1)[1])
    check_target("params", named, dense, smallest)
    with pytest.raises(UserError):
        check_target("params", named - 0.0001, dense, smallest)


def test_budget_minimum_only_for_single_limit():
    lone, both = two_limits({"kv_cache": 0.5}), two_limits({"kv_cache": 0.5, "params": 0.9})
    assert lone.limits[0].minimum > 0
    assert [limit.minimum for limit in both.limits] == [0, 0]
    with pytest.raises(UserError, match=r"target kv_cache=0.001 is .* bytes a token"):
        two_limits({"kv_cache": 0.001})


def test_parameter_budget_unreachable_target():
    dense, smallest = SPACE.dense_parameters, SPACE.fixed_parameters
    with pytest.raises(UserError, match=rf"the smallest possible target is {-(-smallest * 10_000 // dense) / 1e4}"):
        parameter_budget(0.01, SPACE)
    with pytest.raises(UserError, match="dense model has only"):
        parameter_budget(dense + 1, SPACE)
    assert parameter_budget(dense, SPACE).limits[0].maximum == dense


def test_plan_json_round_trip():
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
