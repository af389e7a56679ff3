"""Tests of settings and values of the last release."""

import logging

import pytest
import yaml

from darwinlm.config import former
from darwinlm.config.former import Change
from darwinlm.config.loading import known_keys, load_recipe, make_recipe
from darwinlm.errors import UserError

GIVEN = {"model": "some/model", "target": 0.5}


@pytest.fixture
def former_settings(monkeypatch):
    changes = {
        "search.children": Change("search.offspring", "0.2.5"),
        "descent.rounds": Change("search.descent_rounds", "0.2.5"),
        "search.luck": Change(None, "0.2.5", "the search has enough of it"),
        "random_seed": Change("seed", "0.2.5"),
    }
    monkeypatch.setattr(former, "FORMER", changes)
    former._warn_once.cache_clear()
    yield
    former._warn_once.cache_clear()


OLD = "search: {children: 8, luck: 3}\ndescent: {rounds: 2}\nrandom_seed: 5\n"


def test_former_settings_warn_once(former_settings, tmp_path, caplog):
    (tmp_path / "old.yaml").write_text(OLD)
    recipe = load_recipe(tmp_path / "old.yaml", GIVEN)
    assert recipe == load_recipe("quick", {**GIVEN, "search.offspring": 8, "search.descent_rounds": 2, "seed": 5})
    settings = {**GIVEN, **yaml.safe_load(OLD)}
    assert make_recipe(settings) == recipe
    assert settings == {**GIVEN, **yaml.safe_load(OLD)}, "a manifest keeps what it had"
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (
            logging.WARNING,
            "recipe: search.children was renamed to search.offspring in 0.2.5; descent.rounds was renamed to "
            "search.descent_rounds in 0.2.5; search.luck was removed in 0.2.5 and is ignored: the search has enough of "
            "it; random_seed was renamed to seed in 0.2.5",
        )
    ]


def test_override_by_former_or_present_name(former_settings, tmp_path, caplog):
    (tmp_path / "old.yaml").write_text(OLD)
    (tmp_path / "new.yaml").write_text("search: {offspring: 8}\nseed: 5\n")
    for file in ("old.yaml", "new.yaml"):
        for key in ("search.children", "search.offspring"):
            assert load_recipe(tmp_path / file, {**GIVEN, key: 4, "search.luck": 9}).search.offspring == 4
    assert load_recipe("quick", {**GIVEN, "search": {"children": 4}}).search.offspring == 4
    assert "recipe: search.luck was removed in 0.2.5" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"search": {"children": 8, "offspring": 8}},
            "search.children is the former name of search.offspring, and both",
        ),
        ({"search": {"children": 0}}, "search.offspring = 0: input should be greater"),
        ({"search": {"child": 8}}, "unknown setting 'search.child'"),
        ({"descent": {"rounds": 2, "depth": 1}}, "unknown setting 'descent'"),
        ({"descent": {"rounds": 2}, "search": 3}, "search = 3: this is a section"),
    ],
)
def test_former_settings_validated(settings, message, former_settings):
    with pytest.raises(UserError, match=f"^recipe: {message}"):
        make_recipe({**GIVEN, **settings})


def test_override_by_both_names_refused(former_settings):
    with pytest.raises(UserError, match=r"search\.children is the former name of search\.offspring, and both"):
        load_recipe("quick", {**GIVEN, "search.children": 4, "search.offspring": 4})


def test_former_value(caplog):
    former._warn_once.cache_clear()
    for recipe in (
        make_recipe({**GIVEN, "recovery": {"text": "trial"}}),
        load_recipe("quick", {**GIVEN, "recovery.text": "trial"}),
    ):
        assert recipe.recovery.text == "train"
    assert caplog.messages == ["recipe: recovery.text=trial was renamed to recovery.text=train in 0.3.0"]


def test_former_settings_complete():
    for key, change in former.FORMER.items():
        assert key not in known_keys()
        assert change.now in known_keys() if change.now else change.reason, key
