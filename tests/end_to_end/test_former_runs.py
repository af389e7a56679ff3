"""Tests of runs of versions 0.1.0 and 0.2.0: this version resumes them with their original settings."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import TARGET

import darwinlm
from darwinlm.config import former
from darwinlm.config.loading import _flatten, load_recipe, make_recipe
from darwinlm.data.corpus import load_corpus, save_corpus
from darwinlm.run.directory import RunDirectory
from darwinlm.runtime.files import file_checksum, read_json, write_json

FORMER = json.loads((Path(__file__).parents[1] / "fixtures" / "former_run.json").read_text())
"""Recipe and facts in the manifest of a run of version 0.1.0."""


def test_former_run_settings_keep_values():
    recipe = make_recipe(FORMER["recipe"])
    now = _flatten(recipe.model_dump(mode="json"))
    for key, value in _flatten(FORMER["recipe"]).items():
        name = former.FORMER[key].now if key in former.FORMER else key
        changed = former.VALUES.get((key, value)) if isinstance(value, str) else None
        assert name is None or now[name] == (changed.now if changed else value), key
    assert recipe.search.optimizer == "adamw", "trials with a rate of AdamW are trained as they were"
    assert not recipe.wants_uniform(experts=False)


def test_former_run_resumed_with_recipe_file(tmp_path, caplog):
    former._warn_once.cache_clear()
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(FORMER["recipe"]))
    write_json(tmp_path / "manifest.json", {"format": 1, **FORMER, "stages": {}}, sealed=True)
    RunDirectory.check(tmp_path, load_recipe(file, {"model": "my-checkpoint", "target": 0.7}))
    for note in (
        "data.trial_tokens was renamed to data.train_tokens in 0.3.0",
        "recovery.text=trial was renamed to recovery.text=train in 0.3.0",
        "search.max_flips was removed in 0.3.0 and is ignored: ",
    ):
        assert caplog.text.count(note) == 1
    now = load_recipe("quick", {"model": "my-checkpoint", "target": 0.7, "data.source": "texts"})
    with pytest.raises(darwinlm.UserError, match=rf"search.learning_rate: 0.0001 -> auto.*--recipe {file}"):
        RunDirectory.check(tmp_path, now)


def test_former_finished_run_resumed(run, checkpoint, tmp_path, caplog):
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


RENAMED = {"trial_tokens": "train_tokens", "score_tokens": "validation_tokens", "held_out_tokens": "test_tokens"}
"""Settings of `data`: names in 0.2.0 and present names."""


@pytest.fixture
def of_0_2_0(run, tmp_path):
    """Copy of the finished run with the files of version 0.2.0, and its settings by their former names."""
    finished, settings = run
    copied = shutil.copytree(finished.path, tmp_path / "run")
    corpus, manifest = copied / "corpus.safetensors", read_json(copied / "manifest.json")
    save_corpus(load_corpus(corpus), corpus, former=True)
    manifest["files"]["corpus"][corpus.name] = file_checksum(corpus)
    manifest["facts"]["darwinlm"] = "0.2.0"
    for before, now in RENAMED.items():
        manifest["recipe"]["data"][before] = manifest["recipe"]["data"].pop(now)
    manifest["recipe"]["recovery"]["text"] = "trial"
    write_json(copied / "manifest.json", manifest, sealed=True)
    (copied / "recipe.yaml").write_text(yaml.safe_dump(manifest["recipe"]))
    settings = {key: value for key, value in settings.items() if key.removeprefix("data.") not in RENAMED.values()}
    settings |= {f"data.{before}": manifest["recipe"]["data"][before] for before in RENAMED}
    return copied, {**settings, "recovery.text": "trial"}


@pytest.mark.parametrize("lost", [False, True])
def test_former_run_0_2_resumed_with_restored_corpus(lost, of_0_2_0, run, checkpoint, caplog):
    out, settings = of_0_2_0
    corpus, before = (out / "corpus.safetensors").read_bytes(), read_json(out / "manifest.json")
    shutil.rmtree(out / "model")
    if lost:
        (out / "corpus.safetensors").unlink()
    former._warn_once.cache_clear()
    with caplog.at_level(logging.INFO):
        darwinlm.prune(checkpoint("qwen3"), target=TARGET, out=out, settings=settings)
    for name, now in RENAMED.items():
        assert f"data.{name} was renamed to data.{now} in 0.3.0" in caplog.text
    assert ("corpus.safetensors is missing: recreating it (corpus)" in caplog.text) is lost
    assert (out / "corpus.safetensors").read_bytes() == corpus
    stages = read_json(out / "manifest.json")["stages"]
    assert all(stages[name] == before["stages"][name] for name in ("database", "search", "recovery", "evaluation"))
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (out, run[0].path)]
    assert weights[0] == weights[1]


def test_former_run_0_2_same_under_present_names(of_0_2_0, checkpoint, run):
    out, _ = of_0_2_0
    recipe = load_recipe("quick", {**run[1], "model": str(checkpoint("qwen3")), "target": TARGET})
    RunDirectory.check(out, recipe)
    longer = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_tokens": 160})})
    with pytest.raises(darwinlm.UserError, match=r"another recipe \(data.train_tokens: 128 -> 160\)"):
        RunDirectory.check(out, longer)


def test_former_run_of_another_model_refused(tmp_path):
    recipe = make_recipe(FORMER["recipe"])
    write_json(tmp_path / "manifest.json", {"format": 1, **FORMER, "stages": {}}, sealed=True)
    with pytest.raises(darwinlm.UserError, match=r"model was .* when this run started"):
        RunDirectory.open(tmp_path, recipe, {"model": "another", "darwinlm": darwinlm.__version__})
