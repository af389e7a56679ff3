"""Recipes: the built-in ones, and recipes written as YAML."""

import pytest
import yaml

from darwinlm.config.loading import load_recipe, make_recipe
from darwinlm.config.recipe import Recipe

GIVEN = {"model": "some/model", "target": 0.5}


PAPERS = ["llama2_7b_2.7b", "llama3.1_8b_4.6b", "qwen2.5_14b_8.4b"]


@pytest.mark.parametrize("name", ["quick", "paper", "demo", *PAPERS])
def test_a_built_in_recipe_loads_and_survives_yaml(name):
    recipe = load_recipe(name, GIVEN)
    assert recipe.model == "some/model"
    assert make_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("name", PAPERS)
def test_a_case_of_the_paper_is_complete(name):
    recipe = load_recipe(name, {})
    assert recipe.recovery.tokens == 10_000_000_000
    assert recipe.search.model_copy(update={"trial_optimizer": "auto"}) == load_recipe("paper", GIVEN).search
    assert recipe.target == name.split("_")[-1].upper()


def test_quick_is_the_defaults_written_out():
    assert load_recipe("quick", GIVEN) == make_recipe(GIVEN)


def test_a_complete_recipe_has_every_setting_in_its_yaml():
    written = yaml.safe_load(make_recipe(GIVEN).to_yaml())
    assert set(written) == set(Recipe.model_fields)
    for name in ("data", "database", "search", "workload", "recovery", "export"):
        assert set(written[name]) == set(type(getattr(make_recipe(GIVEN), name)).model_fields)


@pytest.mark.parametrize(
    ("target", "kept"),
    [("0.50", 0.5), (1, 1.0), (" 2.7B ", "2.7B"), (2_700_000_000, "2700000000"), (1e9, "1000000000")],
)
def test_a_recipe_keeps_a_count_as_it_was_written(target, kept):
    assert make_recipe({**GIVEN, "target": target}).target == kept
