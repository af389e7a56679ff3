"""Recipes: what is built in loads, sizes are read exactly, and no text whatever gives anything but a clear refusal."""

import logging
import string
from datetime import date

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from darwinlm.config import former
from darwinlm.config.former import Change
from darwinlm.config.loading import differences, known_keys, load_recipe, make_recipe, parse_override
from darwinlm.config.recipe import Recipe
from darwinlm.config.target import parse_size, parse_target, split_targets
from darwinlm.errors import UserError

GIVEN = {"model": "some/model", "target": 0.5}

patient = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


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


def test_a_recipe_file_is_read_and_overridden_key_by_key(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\nsearch: {generations: 2}\nrecovery:\n  # nothing here yet\n")
    recipe = load_recipe(file, {**GIVEN, "search.offspring": 9, "recovery.tokens": 0, "data.source": "text.txt"})
    assert (recipe.seed, recipe.search.generations, recipe.search.offspring) == (3, 2, 9)
    assert (recipe.recovery.tokens, recipe.recovery.batch_size, recipe.data.source) == (0, 2, "text.txt")


def test_a_complete_recipe_has_every_setting_in_its_yaml():
    written = yaml.safe_load(make_recipe(GIVEN).to_yaml())
    assert set(written) == set(Recipe.model_fields)
    for name in ("data", "database", "search", "workload", "recovery", "export"):
        assert set(written[name]) == set(type(getattr(make_recipe(GIVEN), name)).model_fields)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0.5, 0.5),
        ("0.5", 0.5),
        (" .25 ", 0.25),
        ("5e-1", 0.5),
        (1, 1.0),
        ("1", 1.0),
        ("2.7B", 2_700_000_000),
        ("2.7 b", 2_700_000_000),
        ("8.03B", 8_030_000_000),  # 8.03 * 1e9 is 8029999999.999999
        ("500M", 500_000_000),
        ("0.5B", 500_000_000),
        ("1.5k", 1_500),
        ("1T", 10**12),
        ("1_000_000", 1_000_000),
        ("1e9", 10**9),
        (2_700_000_000, 2_700_000_000),
        (1e9, 10**9),
        (10**400, 10**400),
    ],
)
def test_a_size_is_a_fraction_or_a_count(text, size):
    found = parse_size(text)
    assert found == size
    assert type(found) is type(size)


@pytest.mark.parametrize("text", ["abc", "", "50%", "0.5x", "2.7BB", "B", "1,000,000", "½", "0x10"])
def test_what_is_no_size_is_refused_with_an_example_of_each_kind(text):
    with pytest.raises(ValueError, match=r"neither a fraction of the parameters \(0.5\) nor a number of them \(2.7B"):
        parse_size(text)


@pytest.mark.parametrize(
    ("target", "kept"),
    [("0.50", 0.5), (1, 1.0), (" 2.7B ", "2.7B"), (2_700_000_000, "2700000000"), (1e9, "1000000000")],
)
def test_a_recipe_keeps_a_count_as_it_was_written(target, kept):
    assert make_recipe({**GIVEN, "target": target}).target == kept


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        (0.5, {"params": 0.5}),
        ("2.7B", {"params": 2_700_000_000}),
        ("params=2.7B, kv_cache=0.5", {"params": 2_700_000_000, "kv_cache": 0.5}),
        ("latency=0.6,flops=1", {"latency": 0.6, "flops": 1.0}),
        ("memory=8GB", {"memory": 8 * 10**9}),
        ("memory=1.5GiB", {"memory": 3 * 2**29}),
        ("memory=0.25", {"memory": 0.25}),
    ],
)
def test_a_target_is_a_limit_for_each_resource(text, limits):
    assert parse_target(text) == limits
    assert parse_target(make_recipe({**GIVEN, "target": text}).target) == limits


def test_sizes_with_commas_between_are_a_family():
    assert split_targets("0.8, 0.6,100M") == ["0.8", "0.6", "100M"]
    assert split_targets("params=0.5,kv_cache=0.5") == ["params=0.5,kv_cache=0.5"]
    assert split_targets(0.5) == [0.5]


def test_differences_name_the_setting_and_both_values():
    old, new = make_recipe(GIVEN), load_recipe("quick", {**GIVEN, "seed": 1, "search.offspring": 8})
    assert differences(old, new) == ["seed: 0 -> 1", "search.offspring: 6 -> 8"]
    assert differences(new, old) == ["seed: 1 -> 0", "search.offspring: 8 -> 6"]
    assert differences(old, make_recipe({**GIVEN, "target": "0.50"})) == []


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


def test_former_settings_are_read_with_one_warning(former_settings, tmp_path, caplog):
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


def test_an_override_wins_by_either_name(former_settings, tmp_path, caplog):
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
def test_former_settings_are_checked_like_present_ones(settings, message, former_settings):
    with pytest.raises(UserError, match=f"^recipe: {message}"):
        make_recipe({**GIVEN, **settings})


def test_an_override_given_by_both_names_is_refused(former_settings):
    with pytest.raises(UserError, match=r"search\.children is the former name of search\.offspring, and both"):
        load_recipe("quick", {**GIVEN, "search.children": 4, "search.offspring": 4})


def test_a_former_value_is_read_like_the_present_one(caplog):
    former._warn_once.cache_clear()
    for recipe in (
        make_recipe({**GIVEN, "recovery": {"text": "trial"}}),
        load_recipe("quick", {**GIVEN, "recovery.text": "trial"}),
    ):
        assert recipe.recovery.text == "train"
    assert caplog.messages == ["recipe: recovery.text=trial was renamed to recovery.text=train in 0.3.0"]


def test_every_former_setting_has_a_present_name_or_a_reason():
    for key, change in former.FORMER.items():
        assert key not in known_keys()
        assert change.now in known_keys() if change.now else change.reason, key


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
def test_an_override_is_a_key_and_a_yaml_value(text, expected):
    assert parse_override(text) == expected


def test_a_learning_rate_may_be_written_as_yaml_does_not_know_it():
    key, value = parse_override("search.learning_rate=1e-4")
    assert load_recipe("quick", {**GIVEN, key: value}).search.learning_rate == 1e-4


# Keys that exist, so that a value reaches the check of its setting, and keys that do not.
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
    """Anything may be refused, in one line; nothing may go wrong."""
    try:
        assert isinstance(read(), Recipe)
        return
    except UserError as error:
        message = str(error)
    assert message
    assert "\n" not in message
    assert len(message) < 4_000


@patient
@given(nested=st.dictionaries(KEYS, VALUES, max_size=5))
@example(nested={1: 2})
@example(nested={"data": {1: 2}})
@example(nested={"search": {"offspring": 2**20_000}})  # more digits than Python prints
@example(nested={"search": {"offspring": -(2**20_000)}})
@example(nested={"target": 2**20_000})
@example(nested={"target": "9" * 400 + "B"})
@example(nested={"target": "2\n"})
@example(nested={"seed": date(2024, 1, 1)})
def test_any_nested_settings_are_read_or_refused(nested):
    refused_or_read(lambda: make_recipe(nested))
    refused_or_read(lambda: make_recipe({**GIVEN, **nested}))


@patient
@given(overrides=st.dictionaries(st.lists(KEYS, min_size=1, max_size=3).map(".".join), VALUES, max_size=3))
@example(overrides={"seed.a": 1})
@example(overrides={"x\n": 1, "x\n.y": 2})
def test_any_overrides_are_read_or_refused(overrides):
    refused_or_read(lambda: load_recipe("quick", {**GIVEN, **overrides}))


YAML_CHARACTERS = st.sampled_from([*"-:[]{}&*#|>'\"!?%@`,~=<.\n\n  \t", *string.digits, *"xabeo_"])
YAML = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=40).map(str.encode),
    st.text(YAML_CHARACTERS, max_size=40).map(str.encode),
    st.builds("{}: {}\n".format, KEYS, st.text(YAML_CHARACTERS, max_size=20)).map(str.encode),
    st.dictionaries(KEYS, VALUES, max_size=3).map(lambda nested: yaml.safe_dump(nested).encode()),
)


@patient
@given(content=YAML)
@example(content=b"seed: 2024-13-45")  # ValueError in PyYAML, and so on
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
def test_any_file_is_read_or_refused_as_a_recipe(content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(content)
    refused_or_read(lambda: load_recipe(file, GIVEN))
    refused_or_read(lambda: load_recipe(file, {}))


@patient
@given(text=st.one_of(st.text(max_size=30), st.builds("{}={}".format, KEYS, st.text(YAML_CHARACTERS, max_size=20))))
def test_any_set_option_is_read_or_refused(text):
    def read():
        key, value = parse_override(text)
        return load_recipe("quick", {**GIVEN, key: value})

    refused_or_read(read)


@patient
@given(name=st.text(max_size=20))
@example(name="\0")
@example(name="x" * 300)
@example(name="quick/")
@example(name="")
def test_any_recipe_name_is_known_or_refused(name):
    refused_or_read(lambda: load_recipe(name, GIVEN))
