"""Tests of `darwinlm evaluate`: zero-shot tasks with the models of a run, or with a single model."""

import importlib.util
import json
import shutil

import pytest
from tasks import ITEMS, write

from darwinlm import cli
from darwinlm.commands import evaluate
from darwinlm.errors import UserError
from darwinlm.runtime.files import read_json, write_json


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run[0].path, tmp_path / "run")


@pytest.fixture
def answering(monkeypatch):
    """Replace lm-eval: the pruned model is right on only the first two items, the dense model on nine of ten."""
    asked = []

    def run_tasks(model, tokenizer, tasks, limit, after_task):
        dense = all(layer.mlp.down_proj.in_features == 64 for layer in model.model.layers)
        asked.append((dense, [task.name for task in tasks], limit, len(tokenizer("abc")["input_ids"])))
        right = [1.0] * 9 + [0.0] if dense else [1.0] * 2 + [0.0] * 8
        for task in tasks:
            after_task(task.name)
        return {task.name: {"acc": right} for task in tasks}

    monkeypatch.setattr(evaluate, "run_tasks", run_tasks)
    monkeypatch.setattr(evaluate, "require_lm_eval", lambda: None)
    monkeypatch.setattr(evaluate, "check_data", lambda tasks: None)
    return asked


def test_evaluate_run_keeps_earlier_tasks(copied, answering, tmp_path, capsys):
    write(tmp_path / "tasks", "first", ITEMS["choice"])
    write(tmp_path / "tasks", "second", ITEMS["word"])
    command = ["evaluate", str(copied), "--tasks-dir", str(tmp_path / "tasks"), "--quiet"]
    assert cli.exit_code([*command, "--tasks", "second", "--limit", "7"]) == 0
    assert answering == [(True, ["second"], 7, 3), (False, ["second"], 7, 3)]
    assert cli.exit_code(command) == 0
    assert "mean of 2" in capsys.readouterr().out
    metrics = json.loads((copied / "report" / "metrics.json").read_text())
    assert metrics["tasks"] == json.loads((copied / "report" / "tasks.json").read_text())
    assert [(one["task"], one["limit"]) for one in metrics["tasks"]["tasks"]] == [("first", None), ("second", None)]
    pruned = metrics["tasks"]["tasks"][0]["models"]["pruned"]
    assert (pruned["accuracy"], pruned["only_this"], pruned["only_dense"]) == (0.2, 0, 7)
    assert pruned["p"] == 2 / 2**7
    assert metrics["tasks"]["mean"]["acc"]["models"]["pruned"]["p"] == 2 / 2**14
    assert "Zero-shot tasks" in (copied / "report" / "index.html").read_text()

    (tmp_path / "tasks" / "second.jsonl").unlink()
    results = evaluate.evaluate(str(copied), tasks_dir=tmp_path / "tasks", limit=1)
    assert [one["task"] for one in results["tasks"]] == ["first"]
    joined = json.loads((copied / "report" / "tasks.json").read_text())["tasks"]
    assert [(one["task"], one["limit"]) for one in joined] == [("second", None), ("first", 1)]


def test_evaluate_single_model(run, checkpoint, answering, tmp_path):
    write(tmp_path, "first", ITEMS["choice"])
    for source, accuracy_found in ((run[0].model_path, 0.2), (checkpoint("llama"), 0.9)):
        results = evaluate.evaluate(str(source), tasks_dir=tmp_path)
        assert results["tasks"][0]["models"] == {
            "model": {"accuracy": accuracy_found, "stderr": pytest.approx(0.1, abs=0.05)}
        }
    assert not (run[0].path / "report" / "tasks.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no tasks given"),
        (["--tasks-dir", "TASKS", "--tasks", "third"], "no third.jsonl in --tasks-dir, which contains first"),
        (["--tasks", "piqa"], "zero-shot tasks need lm-eval; run: pip install"),
        (["--tasks-dir", "TASKS"], "zero-shot tasks need lm-eval; run: pip install"),
        (["--tasks-dir", "TASKS", "--limit", "0"], "--limit"),
    ],
)
def test_evaluate_error_one_line(arguments, message, copied, tmp_path, capsys, monkeypatch):
    write(tmp_path / "tasks", "first", ITEMS["choice"])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    arguments = [str(tmp_path / "tasks") if argument == "TASKS" else argument for argument in arguments]
    assert cli.exit_code(["evaluate", str(copied), "--quiet", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (copied / "report" / "tasks.json").exists()


def test_evaluate_unfinished_or_changed_run(copied, answering, tmp_path):
    write(tmp_path, "first", ITEMS["choice"])
    manifest = read_json(copied / "manifest.json")
    write_json(copied / "manifest.json", {**manifest, "facts": {**manifest["facts"], "model": "another"}})
    with pytest.raises(UserError, match="has changed since this run"):
        evaluate.evaluate(str(copied), tasks_dir=tmp_path)
    shutil.rmtree(copied / "model")
    with pytest.raises(UserError, match="finish the run first"):
        evaluate.evaluate(str(copied), tasks_dir=tmp_path)
