"""Tests of recipes from files and overrides: any input is read, or refused in one line."""

import string
from datetime import date

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from darwinlm.config.loading import differences, load_recipe, make_recipe, parse_override
from darwinlm.config.recipe import Recipe
from darwinlm.errors import UserError

GIVEN = {"model": "some/model", "target": 0.5}

patient = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_load_recipe_file_with_overrides(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\nsearch: {generations: 2}\nrecovery:\n  # nothing here yet\n")
    recipe = load_recipe(file, {**GIVEN, "search.offspring": 9, "recovery.tokens": 0, "data.source": "text.txt"})
    assert (recipe.seed, recipe.search.generations, recipe.search.offspring) == (3, 2, 9)
    assert (recipe.recovery.tokens, recipe.recovery.batch_size, recipe.data.source) == (0, 2, "text.txt")


def test_differences():
    old, new = make_recipe(GIVEN), load_recipe("quick", {**GIVEN, "seed": 1, "search.offspring": 8})
    assert differences(old, new) == ["seed: 0 -> 1", "search.offspring: 6 -> 8"]
    assert differences(new, old) == ["seed: 1 -> 0", "search.offspring: 8 -> 6"]
    assert differences(old, make_recipe({**GIVEN, "target": "0.50"})) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("search.offspring=8", ("search.offspring", 8)),
        (" seed = 1 ", ("seed", 1)),
        ("search.survivors=[3, 1]", ("search.survivors", [3, 1])),
        ("data.source=a=b", ("data.source", "a=b")),
        ("device=", ("device", None)),
    ],
)
def test_parse_override(text, expected):
    assert parse_override(text) == expected


def test_parse_override_learning_rate_1e_4():
    key, value = parse_override("search.learning_rate=1e-4")
    assert load_recipe("quick", {**GIVEN, key: value}).search.learning_rate == 1e-4


# Existing keys, so that a value reaches the check of its setting, and unknown keys.
KEYS = st.one_of(
    st.sampled_from([*Recipe.model_fields, "offspring", "survivors", "trial_tokens", "sequence_length", "levels"]),
    st.text(max_size=6),
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.dates(),
    st.binary(max_size=4),
    st.text(max_size=8),
    st.sampled_from(["2.7B", "9" * 400 + "B", "1e400", "kv_group", "self", "self\n"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=8,
)


def refused_or_read(read):
    """Check that `read` returns a recipe or raises a one-line error."""
    try:
        assert isinstance(read(), Recipe)
        return
    except UserError as error:
        message = str(error)
    assert message
    assert "\n" not in message
    assert len(message) < 4_000


@pytest.mark.slow
@patient
@given(nested=st.dictionaries(KEYS, VALUES, max_size=5))
@example(nested={1: 2})
@example(nested={"data": {1: 2}})
@example(nested={"search": {"offspring": 2**20_000}})  # more digits than Python can print
@example(nested={"search": {"offspring": -(2**20_000)}})
@example(nested={"target": 2**20_000})
@example(nested={"target": "9" * 400 + "B"})
@example(nested={"target": "2\n"})
@example(nested={"seed": date(2024, 1, 1)})
def test_make_recipe_any_settings(nested):
    refused_or_read(lambda: make_recipe(nested))
    refused_or_read(lambda: make_recipe({**GIVEN, **nested}))


@pytest.mark.slow
@patient
@given(overrides=st.dictionaries(st.lists(KEYS, min_size=1, max_size=3).map(".".join), VALUES, max_size=3))
@example(overrides={"seed.a": 1})
@example(overrides={"x\n": 1, "x\n.y": 2})
def test_load_recipe_any_overrides(overrides):
    refused_or_read(lambda: load_recipe("quick", {**GIVEN, **overrides}))


YAML_CHARACTERS = st.sampled_from([*"-:[]{}&*#|>'\"!?%@`,~=<.\n\n  \t", *string.digits, *"xabeo_"])
YAML = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=40).map(str.encode),
    st.text(YAML_CHARACTERS, max_size=40).map(str.encode),
    st.builds("{}: {}\n".format, KEYS, st.text(YAML_CHARACTERS, max_size=20)).map(str.encode),
    st.dictionaries(KEYS, VALUES, max_size=3).map(lambda nested: yaml.safe_dump(nested).encode()),
)


@pytest.mark.slow
@patient
@given(content=YAML)
@example(content=b"seed: 2024-13-45")  # ValueError in PyYAML, as below
@example(content=b"seed: 0x_")
@example(content=b"seed: !!bool x")
@example(content=b"seed: !!int ''")
@example(content=b"seed: !!timestamp x")
@example(content=b"seed: " + b"9" * 5_000)
@example(content=b"seed: 0x" + b"f" * 5_000)
@example(content=b"a: " + b"[" * 2_000)
@example(content=b"data: &a {source: *a}")
@example(content=b"? [a]\n: b")
@example(content=b"=")
@example(content=b"\xff\xfe")
def test_load_recipe_any_file(content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(content)
    refused_or_read(lambda: load_recipe(file, GIVEN))
    refused_or_read(lambda: load_recipe(file, {}))


@pytest.mark.slow
@patient
@given(text=st.one_of(st.text(max_size=30), st.builds("{}={}".format, KEYS, st.text(YAML_CHARACTERS, max_size=20))))
def test_parse_override_any_text(text):
    def read():
        key, value = parse_override(text)
        return load_recipe("quick", {**GIVEN, key: value})

    refused_or_read(read)


@pytest.mark.slow
@patient
@given(name=st.text(max_size=20))
@example(name="\0")
@example(name="x" * 300)
@example(name="quick/")
@example(name="")
def test_load_recipe_any_name(name):
    refused_or_read(lambda: load_recipe(name, GIVEN))
