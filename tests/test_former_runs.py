"""Runs that version 0.1.0 began: this version continues them with the settings that they were made with."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import TARGET

import darwinlm
from darwinlm.config.loading import load_recipe, make_recipe
from darwinlm.run.directory import RunDirectory
from darwinlm.runtime.files import read_json, write_json

FORMER = json.loads((Path(__file__).parent / "data" / "former_run.json").read_text())
"""What the manifest of a run of version 0.1.0 says of its recipe, and of itself."""


def test_every_setting_that_it_had_keeps_its_value():
    recipe = make_recipe(FORMER["recipe"])
    now = recipe.model_dump(mode="json")
    for key, value in FORMER["recipe"].items():
        kept = {name: now[key][name] for name in value} if isinstance(value, dict) else now[key]
        assert kept == value, key
    assert recipe.search.optimizer == "adamw", "trials with a rate of AdamW are trained as they were"
    assert not recipe.wants_uniform(experts=False)


def test_it_is_continued_with_its_own_recipe_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(FORMER["recipe"]))
    write_json(tmp_path / "manifest.json", {"format": 1, **FORMER, "stages": {}}, sealed=True)
    RunDirectory.check(tmp_path, load_recipe(file, {"model": "my-checkpoint", "target": 0.7}))
    now = load_recipe("quick", {"model": "my-checkpoint", "target": 0.7, "data.source": "texts"})
    with pytest.raises(darwinlm.UserError, match=rf"search.learning_rate: 0.0001 -> auto.*--recipe {file}"):
        RunDirectory.check(tmp_path, now)


def test_a_finished_run_is_continued(run, checkpoint, tmp_path, caplog):
    finished, settings = run
    copied = tmp_path / "run"
    shutil.copytree(finished.path, copied)
    manifest = read_json(copied / "manifest.json")
    assert manifest["facts"]["darwinlm"] == darwinlm.__version__
    manifest["facts"]["darwinlm"] = FORMER["facts"]["darwinlm"]
    write_json(copied / "manifest.json", manifest, sealed=True)
    shutil.rmtree(copied / "model")
    with caplog.at_level(logging.INFO):
        darwinlm.prune(checkpoint("qwen3"), target=TARGET, out=copied, settings=settings)
    assert f"started by darwinlm 0.1.0 and is continued by {darwinlm.__version__}" in caplog.text
    assert read_json(copied / "manifest.json")["facts"] == manifest["facts"]
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (copied, finished.path)]
    assert weights[0] == weights[1]


def test_another_model_is_refused_as_before(tmp_path):
    recipe = make_recipe(FORMER["recipe"])
    write_json(tmp_path / "manifest.json", {"format": 1, **FORMER, "stages": {}}, sealed=True)
    with pytest.raises(darwinlm.UserError, match=r"model was .* when this run started"):
        RunDirectory.open(tmp_path, recipe, {"model": "another", "darwinlm": darwinlm.__version__})
