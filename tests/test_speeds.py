"""`darwinlm evaluate --speed`: what is timed is what is said, and what cannot be timed says why."""

import json
import shutil

import numpy as np
import pytest
from conftest import make_config, save_pruned

from darwinlm import cli
from darwinlm.export import llama_cpp
from darwinlm.export.llama_cpp import Engine, time_requests
from darwinlm.export.targets import export_model
from darwinlm.speeds import measure_speeds


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
    with pytest.raises(llama_cpp.EngineError):
        time_requests({"broken": tmp_path / "broken.gguf"}, [(4, 1)], 1)


def test_a_run_is_timed_by_batch_length_and_engine(run, tmp_path, capsys):
    finished, _ = run
    copied = shutil.copytree(finished.path, tmp_path / "run")
    command = ["evaluate", str(copied), "--speed", "--batches", "1,2", "--lengths", "8,16"]
    assert cli._exit_code(command) == 0
    out = capsys.readouterr().out
    transformers, engine = json.loads((copied / "report" / "speed.json").read_text())["engines"]
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


def test_one_model_alone_is_timed_and_a_missing_engine_is_a_reason(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(llama_cpp, "engine_version", lambda: None)
    results = measure_speeds(str(checkpoint("llama")), [1], [8])
    assert list(results["engines"][0]["rows"][0]["models"]) == ["model"]
    assert results["engines"][1]["skipped"] == "run pip install xllamacpp"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "0"], "--batches '0': write whole numbers from 1 on with commas between, such as 1,4"),
        (["--lengths", "8;16"], "--lengths '8;16': write whole numbers"),
        (["--lengths", "8,120"], "--lengths 120 and 32 new tokens are more than the 128 it knows"),
    ],
)
def test_what_cannot_be_timed_is_one_clear_line(options, message, checkpoint, capsys):
    assert cli._exit_code(["evaluate", str(checkpoint("llama")), "--speed", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
