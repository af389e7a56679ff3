"""`darwinlm evaluate --speed`: what is timed is what is said, and what cannot be timed says why."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers import SETTINGS, make_checkpoint, make_config, save_pruned, uninstall
from transformers import AutoModelForCausalLM

from darwinlm import cli
from darwinlm.commands.speed import measure_speeds
from darwinlm.engines import llama_cpp
from darwinlm.engines import vllm as vllm_engine
from darwinlm.engines.llama_cpp import Engine, time_requests
from darwinlm.errors import EngineError
from darwinlm.evaluation import measure
from darwinlm.export.targets import export_model
from darwinlm.models import loading
from darwinlm.pipeline import prune
from darwinlm.search import budgets as resources


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "model"
    save_pruned(make_config("llama"), folder)
    return export_model(folder, "gguf").path


def test_token_by_token_llama_cpp_says_what_it_says_of_the_whole_text(file):
    engine = Engine(file)
    tokens = list(range(20, 44))
    whole_TV = engine.logits(tokens)
    context = engine._context(len(tokens), exact=True)
    step_by_step = [engine._decode(context, tokens[:10], 0, outputs=1).copy()]
    step_by_step += [engine._decode(context, [tokens[i]], i, outputs=1).copy() for i in range(10, len(tokens))]
    assert np.abs(np.concatenate(step_by_step) - whole_TV[9:]).max() < 1e-4 * np.abs(whole_TV).max()
    assert min(engine.request_seconds(8, 4)) > 0
    engine.close()


def test_files_are_timed_in_turns_and_the_first_pass_does_not_count(monkeypatch, tmp_path):
    timed = []

    class Fake:
        def __init__(self, file):
            self.name = file.name

        def request_seconds(self, prompt_tokens, new_tokens):
            timed.append((self.name, prompt_tokens))
            first = len(timed) <= 2
            return (100.0, 100.0) if first else (float(prompt_tokens), float(len(timed)))

    monkeypatch.setattr(llama_cpp, "Engine", Fake)
    question = {"files": {"dense": "d", "pruned": "p"}, "requests": [[8, 2], [16, 2]], "repeats": 3}
    found = llama_cpp._answer(question)
    assert timed == [(name, length) for length in (8, 16) for _ in range(4) for name in "dp"]
    assert found[0] == {"dense": (8.0, 5.0), "pruned": (8.0, 6.0)}
    assert found[1]["dense"][0] == 16.0


def test_a_file_that_cannot_be_run_is_the_engines_own_reason(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(EngineError):
        time_requests({"broken": tmp_path / "broken.gguf"}, [(4, 1)], 1)


def test_a_run_is_timed_by_batch_length_and_engine(run, tmp_path, capsys):
    finished, _ = run
    copied = shutil.copytree(finished.path, tmp_path / "run")
    command = ["evaluate", str(copied), "--speed", "--batches", "1,2", "--lengths", "8,16"]
    assert cli.exit_code(command) == 0
    out = capsys.readouterr().out
    transformers, engine, vllm = json.loads((copied / "report" / "speed.json").read_text())["engines"]
    assert vllm["engine"] == "vLLM" and vllm["skipped"].startswith("not installed here; --vllm PYTHON selects")
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


@pytest.mark.parametrize(
    ("stored", "device", "fast", "served"),
    [
        ("bfloat16", "cpu", False, "float32"),
        ("bfloat16", "cpu", True, "bfloat16"),
        ("bfloat16", "cuda", False, "float32"),
        ("bfloat16", "cuda", True, "bfloat16"),
        ("float16", "cpu", True, "float32"),
        ("float16", "cuda", False, "float16"),
        ("float32", "cuda", True, "float32"),
    ],
)
def test_a_model_is_timed_in_the_dtype_that_a_user_would_run_it_in(stored, device, fast, served, monkeypatch):
    found = torch.bfloat16 if fast else torch.float32
    monkeypatch.setattr(loading, "fast_dtype", lambda device: found)
    assert loading.served_dtype(getattr(torch, stored), torch.device(device)) == getattr(torch, served)


def test_every_timing_is_of_that_dtype_and_says_so(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "fast_dtype", lambda device: torch.float32)
    uninstall(llama_cpp.PACKAGE, monkeypatch)
    timed = []

    def time_request(model, **request):
        timed.append(model.dtype)
        return 1.0, 1.0

    for user in (measure, resources):
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


def test_one_model_alone_is_timed_and_a_missing_engine_is_a_reason(checkpoint, monkeypatch, capsys):
    uninstall(llama_cpp.PACKAGE, monkeypatch)
    results = measure_speeds(str(checkpoint("llama")), [1], [8])
    assert list(results["engines"][0]["rows"][0]["models"]) == ["model"]
    assert results["engines"][1]["skipped"] == "run pip install xllamacpp"


STAND_IN = '''
"""Notes what it is asked and says nothing; a token takes no time."""
import json, pathlib, sys

class SamplingParams:
    def __init__(self, max_tokens, temperature, ignore_eos, detokenize):
        assert (temperature, ignore_eos, detokenize) == (0.0, True, False)
        self.max_tokens = max_tokens

class LLM:
    def __init__(self, model, max_model_len, max_num_seqs, **settings):
        if not pathlib.Path(model, "config.json").exists():
            raise ValueError("no model\\nthere")
        self.model, self.most, self.longest = model, max_num_seqs, max_model_len

    def generate(self, prompts, sampling, use_tqdm):
        lengths = {len(prompt["prompt_token_ids"]) for prompt in prompts}
        assert len(prompts) <= self.most and max(lengths) + sampling.max_tokens <= self.longest
        print("noise", file=sys.stdout)
        with open(NOTES, "a") as notes:
            ids = [token for prompt in prompts for token in prompt["prompt_token_ids"]]
            note = [pathlib.Path(self.model).name, len(prompts), *lengths, sampling.max_tokens, max(ids)]
            notes.write(json.dumps(note) + "\\n")
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A `vllm` to import, and the file with what it was asked."""
    notes = tmp_path / "notes.jsonl"
    (tmp_path / "site" / "vllm").mkdir(parents=True)
    (tmp_path / "site" / "vllm" / "__init__.py").write_text(STAND_IN + f"NOTES = {str(notes)!r}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    return notes


def test_vllm_is_timed_in_turns_in_a_process_of_its_own_by_batch_and_length(stand_in, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    folders = {"dense": tmp_path / "a", "pruned": tmp_path / "b"}
    device, times = vllm_engine.time_requests(folders, [(1, 8, 4), (3, 16, 4)], repeats=2, vocabulary=50)
    asked = [json.loads(line) for line in stand_in.read_text().splitlines()]
    assert [one[:4] for one in asked] == [
        [name, batch, length, tokens]
        for batch, length in ((1, 8), (3, 16))
        for _ in range(3)
        for name in "ab"
        for tokens in (1, 5)
    ]
    assert max(one[4] for one in asked) < 50
    assert device.endswith("CPU threads") or torch.cuda.is_available()
    assert [list(one) for one in times] == [["dense", "pruned"]] * 2
    assert all(prompt > 0 for one in times for prompt, _ in one.values())


def test_what_vllm_cannot_load_is_its_own_reason(stand_in, tmp_path):
    with pytest.raises(EngineError, match=r"^ValueError: no model there$"):
        vllm_engine.time_requests({"dense": tmp_path}, [(1, 8, 4)], 1, 50)


def test_of_what_vllm_says_the_cause_is_told(stand_in, tmp_path):
    failing = """
import sys
class LLM:
    def __init__(self, **settings):
        print("(EngineCore pid=7) ValueError: No memory for the cache", file=sys.stderr)
        raise RuntimeError("Engine core initialization failed. See root cause above.")
class SamplingParams: pass
import atexit
atexit.register(print, "UserWarning: leaked objects", file=sys.stderr)
"""
    (tmp_path / "site" / "vllm" / "__init__.py").write_text(failing)
    with pytest.raises(EngineError, match=r"^ValueError: No memory for the cache$"):
        vllm_engine.time_requests({"dense": tmp_path}, [(1, 8, 4)], 1, 50)


def test_vllm_gets_the_dense_model_in_its_own_words_and_the_pruned_one_with_our_code(run, tmp_path, monkeypatch):
    finished, _ = run
    copied = shutil.copytree(finished.path, tmp_path / "run")
    seen = {}

    def time_requests(folders, requests, repeats, vocabulary, python):
        for name, folder in folders.items():
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
            ids = torch.arange(12)[None] % vocabulary
            seen[name] = type(model).__name__, model(ids).logits
        return "a device", [dict.fromkeys(folders, (2.0, 4.0)) for _ in requests]

    monkeypatch.setattr(vllm_engine, "engine_version", lambda python: "vllm 0")
    monkeypatch.setattr(vllm_engine, "time_requests", time_requests)
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
def test_what_cannot_be_timed_is_one_clear_line(options, message, checkpoint, capsys):
    assert cli.exit_code(["evaluate", str(checkpoint("llama")), "--speed", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
