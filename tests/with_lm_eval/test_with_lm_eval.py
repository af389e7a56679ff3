"""Tests with lm-eval installed (`make test-eval`): answers equal those of the model and of lm-eval's command line."""

import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import make_tokenizer

from darwinlm import cli
from darwinlm.commands import evaluate
from darwinlm.errors import UserError
from darwinlm.evaluation import zero_shot
from darwinlm.evaluation.local_tasks import local_tasks
from darwinlm.evaluation.zero_shot import choose_tasks
from darwinlm.models.pruned import load

ITEMS = 12


def words(rng, count):
    return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 5))) for _ in range(count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with a file of each item format, with texts that fit the tiny model's context."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("tasks")
    shapes = {
        "choice": lambda: {
            "query": words(rng, 4),
            "choices": [words(rng, 2) for _ in range(3)],
            "gold": rng.randrange(3),
        },
        "question": lambda: {
            "query": f"Question: {words(rng, 3)}\n",
            "choices": [words(rng, 2) for _ in range(4)],
            "gold": rng.randrange(4),
        },
        "contexts": lambda: {
            "context_options": [words(rng, 3), words(rng, 3)],
            "continuation": words(rng, 2),
            "gold": rng.randrange(2),
        },
        "word": lambda: {"context": words(rng, 5), "continuation": rng.choice("abcdefghij")},
    }
    for name, make in shapes.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(make()) + "\n" for _ in range(ITEMS)))
    return folder


@pytest.fixture(scope="module")
def judged(run, folder, tmp_path_factory):
    copied = shutil.copytree(run[0].path, tmp_path_factory.mktemp("judged") / "run")
    return copied, evaluate.evaluate(str(copied), tasks_dir=folder)


def test_requests_match_files(tmp_path):
    items = {
        "choice": {"query": "Two and two are", "choices": ["four", "5"], "gold": 0},
        "digit": {"query": "7", "choices": ["seven", "five"], "gold": 0},
        "question": {"query": "Question: what is {{two}}?\n", "choices": ["a number", "a fish"], "gold": 0},
        "contexts": {"context_options": ["So Ann", "So Bob"], "continuation": "is wet.", "gold": 1},
        "word": {"context": "One, two,", "continuation": "three"},
    }
    for name, item in items.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(item) + "\n")
    asked = {}
    for task in choose_tasks([], local_tasks(tmp_path)):
        (loaded,) = zero_shot._load(task)["tasks"].values()
        loaded.build_all_requests()
        asked[task.name] = [instance.args for instance in loaded.instances]
    assert asked == {
        "choice": [("Two and two are", " four"), ("Two and two are", " 5")],
        "digit": [("7", " seven"), ("7", " five")],
        "question": [("Question: what is {{two}}?\nAnswer:", f" {choice}") for choice in ("a number", "a fish")],
        "contexts": [("So Ann", " is wet."), ("So Bob", " is wet.")],
        "word": [("One, two,", " three")],
    }


@torch.no_grad()
def log_likelihood(model, context, continuation):
    """Return the log-likelihood of `continuation` in nats; each byte is a token."""
    ids = make_tokenizer()(f"{context} {continuation}", return_tensors="pt")["input_ids"]
    logits = model(ids).logits[0, :-1].log_softmax(-1)
    start = len(context.encode()) - 1
    return logits.gather(1, ids[0, 1:, None])[start:].sum().item()


def test_accuracy_matches_log_likelihoods(judged, folder):
    run, results = judged
    model = load(run)
    for name in ("choice", "question", "contexts"):
        right, right_by_length = [], []
        for line in (folder / f"{name}.jsonl").read_text().splitlines():
            item = json.loads(line)
            if name == "contexts":
                scores = [log_likelihood(model, context, item["continuation"]) for context in item["context_options"]]
            else:
                query = item["query"].strip() + "\nAnswer:" if name == "question" else item["query"]
                scores = [log_likelihood(model, query, choice) for choice in item["choices"]]
                by_length = [score / len(choice) for score, choice in zip(scores, item["choices"], strict=True)]
                right_by_length.append(by_length.index(max(by_length)) == item["gold"])
            right.append(scores.index(max(scores)) == item["gold"])
        found = {one["metric"]: one for one in results["tasks"] if one["task"] == name}
        assert found["acc"]["items"] == ITEMS
        assert found["acc"]["models"]["pruned"]["accuracy"] == pytest.approx(sum(right) / ITEMS)
        if right_by_length:
            assert found["acc_norm"]["models"]["pruned"]["accuracy"] == pytest.approx(sum(right_by_length) / ITEMS)


def test_results_match_lm_eval_command(judged, folder, tmp_path):
    run, results = judged
    for name, config in local_tasks(folder).items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    model = f"pretrained={run / 'model'},trust_remote_code=True"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model, "--device", "cpu"]
    command += ["--tasks", "choice,question,contexts,word", "--include_path", str(tmp_path)]
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    for one in results["tasks"]:
        mine = one["models"]["pruned"]
        assert mine["accuracy"] == pytest.approx(theirs[one["task"]][f"{one['metric']},none"])
        assert mine["stderr"] == pytest.approx(theirs[one["task"]][f"{one['metric']}_stderr,none"], abs=1e-6)


def test_limit_takes_first_items(judged, folder):
    run, _ = judged
    few = evaluate.evaluate(str(run / "model"), ["choice"], tasks_dir=folder, limit=5)
    assert [one["items"] for one in few["tasks"]] == [5, 5]
    assert [one["limit"] for one in few["tasks"]] == [5, 5]


def test_paper_tasks_exist():
    tasks = choose_tasks(["paper", "piqa"], {})
    assert [task.name for task in tasks][:2] == ["sciq", "piqa"]
    assert {task.name: task.shots for task in tasks}["mmlu"] == 5
    assert len(tasks) == 9


def test_unknown_task_and_missing_data(judged, capsys):
    run, _ = judged
    with pytest.raises(UserError, match=r"--tasks piqu: unknown lm-eval task; similar tasks are .*piqa"):
        evaluate.evaluate(str(run), ["piqu"])
    before = (run / "report" / "tasks.json").read_bytes()
    assert cli.exit_code(["evaluate", str(run), "--tasks", "piqa", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "--tasks piqa: its data cannot be loaded" in error and len(error.splitlines()) == 1
    assert (run / "report" / "tasks.json").read_bytes() == before
