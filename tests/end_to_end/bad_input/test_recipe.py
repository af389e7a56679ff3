"""Tests of settings and recipe files with mistakes."""

import importlib.util

import pytest
from refusals import NEITHER


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("search", "--set 'search': expected key=value, for example --set search.offspring=8"),
        ("=3", "--set '=3': expected key=value"),
        ("seed=[1", r"--set 'seed=\[1': not valid YAML \(line 1: .*expected"),
        ("seed=2024-13-45", "--set 'seed=2024-13-45': not valid YAML .*month must be in"),
        ("search.offsprin=3", "unknown setting 'search.offsprin'; did you mean 'search.offspring'?"),
        ("searchh.offspring=3", "unknown setting 'searchh'; did you mean 'search'?"),
        ("offspring=3", "unknown setting 'offspring'; did you mean 'search.offspring'?"),
        ("learning_rate=3", "unknown setting 'learning_rate'; did you mean '(search|recovery).learning_rate'?"),
        ("seed.deep=1", "seed = {'deep': 1}: input should be a valid integer"),
        ("data.source.deep=1", "'data.source.deep' cannot be set: 'source' is a value, not a section"),
        ("search=1", "search = 1: this is a section; set one of its settings, such as search.offspring"),
        ("search=", "search = None: this is a section; set one of its settings"),
        ("model=", "model = None: input should be a valid string"),
        ("model=''", "model = '': string should have at least 1 character"),
        ("data.source=''", "data.source = '': string should have at least 1 character"),
        ("search.offspring=many", "search.offspring = 'many': input should be a valid integer"),
        ("search.offspring=1.5", "search.offspring = 1.5: input should be a valid integer"),
        ("search.offspring=yes", "search.offspring = True: must not be a boolean"),
        ("target=true", f"target True {NEITHER}"),
        ("target=[1]", rf"target \[1\] {NEITHER}"),
        ("search.offspring=0", "search.offspring = 0: input should be greater than or equal to 1"),
        ("database.levels=65", "database.levels = 65: input should be less than or equal to 64"),
        ("data.sequence_length=4", "data.sequence_length = 4: input should be greater than or equal to 8"),
        ("seed=-1", "seed = -1: input should be greater than or equal to 0"),
        ("recovery.warmup_ratio=1", "recovery.warmup_ratio = 1: input should be less than 1"),
        (
            "search.learning_rate=.nan",
            "search.learning_rate = nan: must be auto or a number > 0 and <= 1",
        ),
        ("database.granularity=head", "database.granularity = 'head': input should be 'kv_group' or 'query_head'"),
        ("search.survivors=1", r"search.survivors = 1: expected a list, such as \[2, 1\]"),
        ("search.survivors=[1]", r"search.survivors=\[1\], search.trial_tokens=.* must have the same length"),
        ("search.survivors=[2, 2]", r"search.survivors=\[2, 2\] must not increase and must end in 1"),
        (
            "search.survivors=[9, 1]",
            r"search.survivors=\[9, 1\] keeps more than search.offspring=2; lower the first or",
        ),
        ("search.trial_tokens=[a, 2]", "search.trial_tokens.0 = 'a': input should be a valid integer"),
        ("search.trial_tokens=[-1, 16]", "search.trial_tokens must be at least 0 and search.score_tokens at least 1"),
        ("search.trial_tokens=[16, 64]", r"\[16, 64\] exceeds data.train_tokens=32; raise the latter"),
        ("search.score_tokens=[16, 64]", r"\[16, 64\] exceeds data.validation_tokens=32; raise the latter"),
        ("device=abacus", "device 'abacus' is not available: "),
        ("device=meta:x", "device 'meta:x' is not available: "),
    ],
)
def test_invalid_setting(setting, message, refused):
    refused(message, settings=[setting])


@pytest.mark.parametrize(
    ("settings", "missing", "message"),
    [
        (["lora_rank=2", "sharding=fsdp"], None, r"recovery\.lora_rank cannot be combined with recovery\.sharding"),
        (["teacher_dtype=int8", "sharding=fsdp"], None, r"=int8 cannot be combined with recovery\.sharding=fsdp"),
        (["teacher_top_k=8", "text=stream"], None, r"recovery\.teacher_top_k needs recovery\.text=train: streamed"),
        (["lora_rank=2"], "peft", r"^recovery\.lora_rank needs PEFT; pip install 'darwinlm\[lora\]'$"),
        (["loggers=[wandb]"], "wandb", r"^recovery\.loggers: wandb is not installed; pip install wandb$"),
        (["batch_size=3", "micro_batch_size=2"], None, r"recovery\.batch_size=3 is not a multiple of 1 processes"),
    ],
)
def test_invalid_recovery_settings(settings, missing, message, refused, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    refused(message, settings=["recovery.tokens=32", *(f"recovery.{setting}" for setting in settings)])


def test_two_invalid_settings_in_one_line(refused):
    refused("recipe: seed = 'x': .*; search.offspring = 0: ", settings=["seed=x", "search.offspring=0"])


@pytest.mark.parametrize("recipe", ["fast", "nothing.yaml", "./quick"])
def test_recipe_not_found(recipe, refused):
    refused(
        f"recipe '{recipe}': no such file; the built-in recipes are demo, llama2_7b_2.7b, .*, paper, quick, ",
        recipe=recipe,
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 1\ndata: [1\nsearch: 2", r"not valid YAML \(line 3: .*expected ',' or '\]'"),
        (b"\tseed: 1", r"not valid YAML \(line 1: .*found character '\\t' that cannot start any token\)"),
        (b"seed: 1\n---\nseed: 2", r"not valid YAML \(line 2: expected a single document"),
        (b"a: \x01", "not valid YAML .*special characters are not allowed"),
        (b"- seed\n- 1", "expected settings as `key: value` lines, for example `target: 0.5`"),
        (b"just words", "expected settings as `key: value` lines"),
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
        (b"seeed: 1", "unknown setting 'seeed'; did you mean 'seed'?"),
        (b"search:\n  offsprng: 1", "unknown setting 'search.offsprng'; did you mean 'search.offspring'?"),
        (b"search: [1]", "'search.generations' cannot be set: 'search' is a value, not a section"),
    ],
)
def test_invalid_recipe_file(content, message, refused, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(content)
    refused(message, recipe=tmp_path / "recipe.yaml")


def test_recipe_is_a_folder(refused, tmp_path):
    refused(f"recipe '{tmp_path}' cannot be read: Is a directory", recipe=tmp_path)
