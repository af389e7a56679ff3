"""Tests of `darwinlm evaluate --speed`: what is timed is reported, and so is why something cannot be timed."""

import json
import shutil
import sys

import pytest
import torch
from helpers import SETTINGS, make_checkpoint, uninstall
from transformers import AutoModelForCausalLM

from darwinlm import cli
from darwinlm.commands.speed import measure_speeds
from darwinlm.engines import llama_cpp, vllm
from darwinlm.evaluation import measure
from darwinlm.models import loading
from darwinlm.pipeline import prune
from darwinlm.search import budgets


def test_speed_of_run_by_batch_length_engine(run, tmp_path, capsys):
    finished, _ = run
    copied = shutil.copytree(finished.path, tmp_path / "run")
    command = ["evaluate", str(copied), "--speed", "--batches", "1,2", "--lengths", "8,16"]
    assert cli.exit_code(command) == 0
    out = capsys.readouterr().out
    transformers, engine, vllm_results = json.loads((copied / "report" / "speed.json").read_text())["engines"]
    assert vllm_results["engine"] == "vLLM" and vllm_results["skipped"].startswith(
        "not installed here; --vllm PYTHON selects"
    )
    sizes = [(row["batch_size"], row["prompt_tokens"]) for row in transformers["rows"]]
    assert sizes == [(1, 8), (1, 16), (2, 8), (2, 16)]
    assert [(row["batch_size"], row["prompt_tokens"]) for row in engine["rows"]] == [(1, 8), (1, 16)]
    for row in [*transformers["rows"], *engine["rows"]]:
        assert list(row["models"]) == ["dense", "pruned"]
        assert all(speed > 0 for one in row["models"].values() for speed in one.values())
    assert engine["engine"].startswith("xllamacpp ") and engine["dtype"] == "f16"
    for heading in ("prefill, dense", "decode, pruned", "transformers", "xllamacpp"):
        assert heading in out
    row = transformers["rows"][0]["models"]
    ratio = row["pruned"]["decode_tokens_per_second"] / row["dense"]["decode_tokens_per_second"]
    assert f"({ratio:.2f}x)" in out


@pytest.mark.slow
def test_speed_dtype_in_all_outputs(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "fast_dtype", lambda device: torch.float32)
    uninstall(llama_cpp.PACKAGE, monkeypatch)
    timed = []

    def time_request(model, **request):
        timed.append(model.dtype)
        return 1.0, 1.0

    for user in (measure, budgets):
        monkeypatch.setattr(user, "time_request", time_request)
    folder = make_checkpoint("qwen3", tmp_path / "dense", torch.bfloat16)
    settings = SETTINGS | {"data.source": str(text), "recovery.tokens": 0}
    run = prune(folder, target="params=0.8,latency=1.0", out=tmp_path / "run", settings=settings)
    assert cli.exit_code(["evaluate", str(run.path), "--speed", "--batches", "1", "--lengths", "8"]) == 0
    assert set(timed) == {torch.float32}
    assert "float32" in capsys.readouterr().out
    assert run.metrics["environment"]["speed_dtype"] == "float32"
    assert "in float32." in (run.path / "report" / "index.html").read_text()
    assert "in float32, batch 1" in (run.model_path / "README.md").read_text()
    with open(run.model_path / "config.json") as file:
        assert json.load(file)["dtype"] == "bfloat16"


def test_speed_of_single_model_skips_missing_engine(checkpoint, monkeypatch, capsys):
    uninstall(llama_cpp.PACKAGE, monkeypatch)
    results = measure_speeds(str(checkpoint("llama")), [1], [8])
    assert list(results["engines"][0]["rows"][0]["models"]) == ["model"]
    assert results["engines"][1]["skipped"] == "run pip install xllamacpp"


def test_speed_vllm_folders(run, tmp_path, monkeypatch):
    finished, _ = run
    copied = shutil.copytree(finished.path, tmp_path / "run")
    seen = {}

    def time_requests(folders, requests, repeats, vocabulary, python):
        for name, folder in folders.items():
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
            ids = torch.arange(12)[None] % vocabulary
            seen[name] = type(model).__name__, model(ids).logits
        return "a device", [dict.fromkeys(folders, (2.0, 4.0)) for _ in requests]

    monkeypatch.setattr(vllm, "engine_version", lambda python: "vllm 0")
    monkeypatch.setattr(vllm, "time_requests", time_requests)
    uninstall(llama_cpp.PACKAGE, monkeypatch)
    engine = measure_speeds(str(copied), [2], [8])["engines"][2]
    assert (seen["dense"][0], seen["pruned"][0]) == ("Qwen3ForCausalLM", "DarwinLMQwen3ForCausalLM")
    pruned = finished.load()
    expected = pruned(torch.arange(12)[None]).logits
    assert (seen["pruned"][1] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert engine["device"] == "a device" and engine["engine"] == "vllm 0"
    assert engine["rows"][0]["models"]["pruned"] == {"prefill_tokens_per_second": 8, "decode_tokens_per_second": 16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "0"], "--batches '0': expected whole numbers >= 1 separated by commas, such as 1,4"),
        (["--lengths", "8;16"], "--lengths '8;16': expected whole numbers"),
        (["--vllm", sys.executable], "vLLM is not installed for this Python"),
        (["--vllm", "no-such-python"], "--vllm no-such-python cannot be run: No such file or directory"),
        (["--lengths", "8,120"], "--lengths 120 and 32 new tokens exceed the model's maximum of 128"),
    ],
)
def test_speed_error_one_line(options, message, checkpoint, capsys):
    assert cli.exit_code(["evaluate", str(checkpoint("llama")), "--speed", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
