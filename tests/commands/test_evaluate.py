"""Zero-shot tasks: what the statistics say, what is read from JSONL files, what lm-eval makes of them."""

import importlib.util
import itertools
import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwinlm import cli
from darwinlm.commands import evaluate as judging
from darwinlm.errors import UserError
from darwinlm.evaluation import zero_shot
from darwinlm.evaluation.local_tasks import local_tasks
from darwinlm.evaluation.paired import accuracy, mcnemar, mean_of_tasks, paired
from darwinlm.runtime.files import read_json, write_json

RIGHT = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=60)


@pytest.mark.parametrize(("ones", "others"), list(itertools.product(range(6), repeat=2)))
def test_mcnemar_counts_the_tosses_that_are_at_least_as_uneven(ones, others):
    tosses = list(itertools.product((0, 1), repeat=ones + others))
    uneven = [abs(2 * sum(toss) - len(toss)) >= abs(ones - others) for toss in tosses]
    assert mcnemar(ones, others) == pytest.approx(sum(uneven) / len(tosses))


def test_mcnemar_of_thousands_of_items_is_near_the_normal_approximation():
    z = (2_600 - 2_400 - 1) / math.sqrt(5_000)
    assert mcnemar(2_400, 2_600) == mcnemar(2_600, 2_400) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert mcnemar(0, 5_000) == 0.0


@given(RIGHT)
def test_a_paired_comparison_is_that_of_the_differences(items):
    ones, others = ([float(pair[side]) for pair in items] for side in (0, 1))
    found, differences = paired(ones, others), np.subtract(ones, others)
    assert found["difference"] == pytest.approx(differences.mean(), abs=1e-12)
    assert found["difference_stderr"] == pytest.approx(differences.std(ddof=1) / math.sqrt(len(items)), abs=1e-9)
    assert found["only_this"] - found["only_dense"] == pytest.approx(differences.sum())
    alone = accuracy(ones)
    assert alone["accuracy"] == pytest.approx(np.mean(ones))
    assert alone["stderr"] == pytest.approx(np.std(ones, ddof=1) / math.sqrt(len(ones)), abs=1e-9)


def test_the_mean_of_tasks_weighs_tasks_alike_and_pools_their_items():
    def entry(ones, others):
        return {"models": {"dense": accuracy(others), "pruned": accuracy(ones) | paired(ones, others)}}

    few, many = entry([0.0, 0.0, 1.0], [1.0, 1.0, 1.0]), entry([1.0] * 90 + [0.0] * 10, [1.0] * 95 + [0.0] * 5)
    mean = mean_of_tasks([few, many])
    assert mean["dense"]["accuracy"] == pytest.approx((1 + 0.95) / 2)
    assert mean["pruned"]["difference"] == pytest.approx((-2 / 3 - 0.05) / 2)
    assert mean["pruned"]["p"] == mcnemar(0, 7)
    errors = [one["models"]["pruned"]["difference_stderr"] for one in (few, many)]
    assert mean["pruned"]["difference_stderr"] == pytest.approx(math.hypot(*errors) / 2)
    assert "p" not in mean["dense"]


# ---- files


ITEMS = {
    "choice": {"query": "Two and two are", "choices": ["four", "five"], "gold": 0},
    "question": {"query": "Question: what is two?\n", "choices": ["a number", "a fish", "a tree"], "gold": 0},
    "contexts": {
        "context_options": ["It rains and so Ann", "It rains and so Bob"],
        "continuation": "is wet.",
        "gold": 1,
    },
    "word": {"context": "One, two,", "continuation": "three"},
}


def write(folder, name, *lines):
    folder.mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / f"{name}.jsonl").write_text("\n".join(texts) + "\n")


def test_each_shape_of_item_gets_its_own_kind_of_task(tmp_path):
    for name, item in ITEMS.items():
        write(tmp_path, name, item, "", item)
    configs = local_tasks(tmp_path)
    assert set(configs) == set(ITEMS)
    assert configs["choice"]["doc_to_text"] == "query"
    assert configs["question"]["doc_to_text"].endswith("\nAnswer:")
    assert configs["contexts"]["doc_to_choice"] == "context_options"
    assert configs["word"]["output_type"] == "loglikelihood"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "contains no items"),
        (["{"], "line 1 is not JSON"),
        ([ITEMS["word"], "[1, 2]"], "line 2: an item needs the keys query, choices, gold; or "),
        ([ITEMS["word"], ITEMS["choice"]], "line 2: its keys differ from those of the first item"),
        ([{**ITEMS["choice"], "query": 3}], "line 1: query must be text"),
        ([{**ITEMS["choice"], "choices": ["one"]}], "line 1: choices must be a list of two or more texts"),
        ([{**ITEMS["choice"], "choices": ["one", 2]}], "line 1: choices must be a list of two or more texts"),
        ([{**ITEMS["choice"], "gold": 2}], r"line 1: gold must be the index of one of the 2 choices, from 0"),
        ([{**ITEMS["contexts"], "gold": "1"}], r"line 1: gold must be the index of one of the 2 context_options"),
    ],
)
def test_what_is_no_task_is_said_with_its_line(lines, message, tmp_path):
    write(tmp_path, "task", *lines)
    with pytest.raises(UserError, match=message):
        local_tasks(tmp_path)


def test_a_folder_without_tasks(tmp_path):
    with pytest.raises(UserError, match=r"contains no \*\.jsonl"):
        local_tasks(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        local_tasks(tmp_path / "nothing")
    write(tmp_path, "task", "")
    (tmp_path / "task.jsonl").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        local_tasks(tmp_path)


# ---- a run


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run[0].path, tmp_path / "run")


@pytest.fixture
def answering(monkeypatch):
    """In place of lm-eval: the pruned model is right on the first two items alone, the dense one on nine of ten."""
    asked = []

    def run_tasks(model, tokenizer, tasks, limit, after_task):
        dense = all(layer.mlp.down_proj.in_features == 64 for layer in model.model.layers)
        asked.append((dense, [task.name for task in tasks], limit, len(tokenizer("abc")["input_ids"])))
        right = [1.0] * 9 + [0.0] if dense else [1.0] * 2 + [0.0] * 8
        for task in tasks:
            after_task(task.name)
        return {task.name: {"acc": right} for task in tasks}

    monkeypatch.setattr(judging, "run_tasks", run_tasks)
    monkeypatch.setattr(judging, "require_lm_eval", lambda: None)
    monkeypatch.setattr(judging, "check_data", lambda tasks: None)
    return asked


def test_a_run_is_judged_dense_and_pruned_and_what_was_judged_before_stays(copied, answering, tmp_path, capsys):
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
    results = judging.evaluate(str(copied), tasks_dir=tmp_path / "tasks", limit=1)
    assert [one["task"] for one in results["tasks"]] == ["first"]
    joined = json.loads((copied / "report" / "tasks.json").read_text())["tasks"]
    assert [(one["task"], one["limit"]) for one in joined] == [("second", None), ("first", 1)]


def test_a_model_alone_is_judged_alone(run, checkpoint, answering, tmp_path):
    write(tmp_path, "first", ITEMS["choice"])
    for source, accuracy_found in ((run[0].model_path, 0.2), (checkpoint("llama"), 0.9)):
        results = judging.evaluate(str(source), tasks_dir=tmp_path)
        assert results["tasks"][0]["models"] == {
            "model": {"accuracy": accuracy_found, "stderr": pytest.approx(0.1, abs=0.05)}
        }
    assert not (run[0].path / "report" / "tasks.json").exists()


def test_items_keep_their_order_over_parts_and_filters():
    def sample(number, acc, kind="none"):
        return {"doc_id": number, "filter": kind, "acc": acc, "acc_norm": 1 - acc}

    parts = {"b": [sample(1, 0), sample(0, 1), sample(0, 0, "other")], "a": [sample(0, 0)]}
    assert zero_shot._items("task", parts) == {"acc": [0.0, 1.0, 0.0], "acc_norm": [1.0, 0.0, 1.0]}
    with pytest.raises(UserError, match=r"reports none of the supported metrics \(acc, acc_norm, exact_match\)"):
        zero_shot._items("task", {"a": [{"doc_id": 0, "filter": "none", "perplexity": 3.0}]})


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
def test_what_cannot_be_judged_is_said_in_one_line(arguments, message, copied, tmp_path, capsys, monkeypatch):
    write(tmp_path / "tasks", "first", ITEMS["choice"])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    arguments = [str(tmp_path / "tasks") if argument == "TASKS" else argument for argument in arguments]
    assert cli.exit_code(["evaluate", str(copied), "--quiet", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (copied / "report" / "tasks.json").exists()


def test_a_run_without_a_model_or_of_a_model_that_has_changed(copied, answering, tmp_path):
    write(tmp_path, "first", ITEMS["choice"])
    manifest = read_json(copied / "manifest.json")
    write_json(copied / "manifest.json", {**manifest, "facts": {**manifest["facts"], "model": "another"}})
    with pytest.raises(UserError, match="has changed since this run"):
        judging.evaluate(str(copied), tasks_dir=tmp_path)
    shutil.rmtree(copied / "model")
    with pytest.raises(UserError, match="finish the run first"):
        judging.evaluate(str(copied), tasks_dir=tmp_path)
