"""Fuzz the readers of recipes, targets and plans: they return or raise a one-line error, and never crash or hang."""

import contextlib
import json
from dataclasses import replace

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from spaces import TINY_SPACE

from darwinlm.config.loading import known_keys, load_recipe, parse_override
from darwinlm.config.recipe import Recipe
from darwinlm.config.target import parse_target, split_targets
from darwinlm.database.store import Database, read_space
from darwinlm.errors import UserError
from darwinlm.plan import Plan, check_target, parameter_budget
from darwinlm.runtime.files import read_json, write_json

pytestmark = pytest.mark.slow

FUZZ = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**300, max_value=10**310)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["0.5", "2.7B", "params=0.5", "0.8,0.6", "1e999", "-0", "\u0661", "\uff19", "1_0", "0x10", "nan%"]
    )
    | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(known_keys()) | st.text(max_size=12)


def one_line(error):
    assert "\n" not in str(error), str(error)
    assert len(str(error)) < 4_000


@FUZZ
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(content=b"a: &a [*a]")
@example(content=b"search: &a {trial_tokens: *a}")
@example(content=b"x: !!python/object/apply:os.system [id]")
@example(content=b"a: " + b"[" * 1_000)
@example(content=b"? [1, 2]\n: 3")
@example(content=b"seed: " + b"9" * 5_000)
@example(content=b"target: 2024-01-01")
@example(content=b"target: !!binary aGVsbG8=")
@example(content=b"<<: 1")
@example(content=b"\xef\xbb\xbfseed: 1")
def test_fuzz_recipe_file(content, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(content)
    try:
        recipe = load_recipe(tmp_path / "recipe.yaml", {"model": "m", "target": 0.5})
    except UserError as error:
        one_line(error)
    else:
        assert isinstance(recipe, Recipe)


@FUZZ
@given(settings=st.dictionaries(KEYS, VALUES, max_size=5))
def test_fuzz_recipe_values(settings, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"seed": 1}))
    try:
        recipe = load_recipe(tmp_path / "recipe.yaml", {"model": "m", "target": 0.5, **settings})
    except UserError as error:
        one_line(error)
        return
    # Accepted recipes survive a round trip through YAML.
    (tmp_path / "again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml", {}) == recipe


@FUZZ
@given(text=st.text(max_size=60))
@example(text="a=" + "[" * 5_000)
@example(text="=")
def test_fuzz_setting(text):
    try:
        key, value = parse_override(text)
        load_recipe("quick", {"model": "m", "target": 0.5, key: value})
    except UserError as error:
        one_line(error)


@FUZZ
@given(
    target=st.text(max_size=30)
    | st.text(alphabet="0123456789.,=eE+-_KMBTGi params memory kv_cache flops latency", max_size=30)
    | st.integers()
    | st.floats()
)
@example("9" * 5_000)
@example("9" * 5_000 + "B")
@example("1e999999999")
@example("memory=" + "9" * 400 + "GB")
@example("0." + "0" * 400 + "1")
@example("5e-324")
def test_fuzz_target(target):
    try:
        recipe = load_recipe("quick", {"model": "m", "target": target})
    except UserError as error:
        one_line(error)
        return
    for part in split_targets(recipe.target):
        for name, size in parse_target(part).items():
            with contextlib.suppress(UserError):
                check_target(name, size, 10**9, 10**6)


PLANS = st.fixed_dictionaries(
    {},
    optional={
        "format": st.just(1) | VALUES,
        "levels": VALUES
        | st.fixed_dictionaries({site.name: st.integers(-1, 4) | VALUES for site in TINY_SPACE.sites})
        | st.fixed_dictionaries({site.name: st.integers(0, 2) for site in TINY_SPACE.sites}),
    },
)


@FUZZ
@given(payload=PLANS)
def test_fuzz_plan(payload):
    try:
        plan = Plan.from_dict(payload, TINY_SPACE)
    except UserError as error:
        one_line(error)
        return
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict(TINY_SPACE))), TINY_SPACE) == plan
    assert TINY_SPACE.fixed_parameters <= TINY_SPACE.parameters(plan.levels) <= TINY_SPACE.dense_parameters


@FUZZ
@given(content=st.binary(max_size=100) | VALUES.map(lambda value: json.dumps(value, default=str).encode()))
@example(content=b"[" * 100_000)
@example(content=b"1" * 10_000)
@example(content=b'{"checksum": []}')
@example(content=b'{"a": NaN, "checksum": "x"}')
def test_fuzz_json_file(content, tmp_path):
    (tmp_path / "plan.json").write_bytes(content)
    try:
        payload = read_json(tmp_path / "plan.json")
        Plan.from_dict(payload, TINY_SPACE)
    except UserError as error:
        one_line(error)


ENTRY = {"layer": 0, "kind": "mlp", "blake2b": "0", "units": [2, 0]}
ENTRY |= {"parameters": [20, 0], "kv_elements": [0, 0], "errors": [0.0, 1.0]}


@FUZZ
@given(
    payload=st.fixed_dictionaries(
        {"format": st.just(2)},
        optional={
            "fixed_parameters": st.just(10) | VALUES,
            "sites": VALUES
            | st.dictionaries(
                st.sampled_from(["layers.0.mlp", "../outside", "layers.1.mlp\n"]) | st.text(max_size=8),
                st.builds(lambda changes: ENTRY | changes, st.dictionaries(st.sampled_from([*ENTRY, "a"]), VALUES)),
                max_size=2,
            ),
        },
    )
)
@example(payload={"format": 2, "sites": {"layers.0.mlp": ENTRY}, "fixed_parameters": 10})
@example(payload={"format": 2, "sites": {"layers.0.mlp": ENTRY | {"errors": [0.0]}}})
@example(payload={"format": 2, "sqtes": {}})
def test_fuzz_database_index(payload, tmp_path):
    try:
        write_json(tmp_path / "index.json", payload, sealed=True)
    except (TypeError, ValueError):  # a date, NaN, or an integer of thousands of digits
        return
    try:
        database = Database(tmp_path)
        space = read_space(tmp_path)
    except UserError as error:
        one_line(error)
        return
    assert space is None or [site.name for site in space.sites] == list(payload["sites"])
    database.forget_damaged()
    assert read_space(tmp_path) in (None, replace(space, sites=()) if space else None)


@FUZZ
@given(target=st.floats(0, 1, exclude_min=True) | st.integers(1, 400))
def test_fuzz_budget(target):
    try:
        budget = parameter_budget(target, TINY_SPACE)
    except UserError as error:
        one_line(error)
        return
    most = budget.limits[0].maximum
    assert TINY_SPACE.fixed_parameters <= most <= TINY_SPACE.dense_parameters
    assert most == target if isinstance(target, int) else most <= target * TINY_SPACE.dense_parameters + 1e-9


def test_endless_recipe_file_refused():
    with pytest.raises(UserError, match="recipe '/dev/zero' is larger than 1 MiB and not a recipe"):
        load_recipe("/dev/zero", {"model": "m", "target": 0.5})
