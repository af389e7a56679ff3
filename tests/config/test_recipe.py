"""Tests of the built-in recipes, and of recipes written as YAML."""

import pytest
import yaml

from darwinlm.config.loading import load_recipe, make_recipe
from darwinlm.config.recipe import Recipe

GIVEN = {"model": "some/model", "target": 0.5}


PAPERS = ["llama2_7b_2.7b", "llama3.1_8b_4.6b", "qwen2.5_14b_8.4b"]


@pytest.mark.parametrize("name", ["quick", "paper", "demo", *PAPERS])
def test_built_in_recipe_yaml_round_trip(name):
    recipe = load_recipe(name, GIVEN)
    assert recipe.model == "some/model"
    assert make_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("name", PAPERS)
def test_paper_recipe_complete(name):
    recipe = load_recipe(name, {})
    assert recipe.recovery.tokens == 10_000_000_000
    assert recipe.search.model_copy(update={"trial_optimizer": "auto"}) == load_recipe("paper", GIVEN).search
    assert recipe.target == name.split("_")[-1].upper()


def test_quick_recipe_is_defaults():
    assert load_recipe("quick", GIVEN) == make_recipe(GIVEN)


def test_to_yaml_contains_all_settings():
    written = yaml.safe_load(make_recipe(GIVEN).to_yaml())
    assert set(written) == set(Recipe.model_fields)
    for name in ("data", "database", "search", "workload", "recovery", "export"):
        assert set(written[name]) == set(type(getattr(make_recipe(GIVEN), name)).model_fields)


@pytest.mark.parametrize(
    ("target", "kept"),
    [("0.50", 0.5), (1, 1.0), (" 2.7B ", "2.7B"), (2_700_000_000, "2700000000"), (1e9, "1000000000")],
)
def test_recipe_target_keeps_notation(target, kept):
    assert make_recipe({**GIVEN, "target": target}).target == kept
