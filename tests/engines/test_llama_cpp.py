"""Tests of llama.cpp: logits token by token, and timing."""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers import make_config, save_pruned

from darwinlm.engines import llama_cpp
from darwinlm.engines.llama_cpp import Engine, time_requests
from darwinlm.errors import EngineError
from darwinlm.export.targets import export_model


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "model"
    save_pruned(make_config("llama"), folder)
    return export_model(folder, "gguf").path


def test_llama_cpp_logits_token_by_token(file):
    engine = Engine(file)
    tokens = list(range(20, 44))
    whole_TV = engine.logits(tokens)
    context = engine._context(len(tokens), exact=True)
    step_by_step = [engine._decode(context, tokens[:10], 0, outputs=1).copy()]
    step_by_step += [engine._decode(context, [tokens[i]], i, outputs=1).copy() for i in range(10, len(tokens))]
    assert np.abs(np.concatenate(step_by_step) - whole_TV[9:]).max() < 1e-4 * np.abs(whole_TV).max()
    engine.close()


def test_llama_cpp_request_seconds(file, monkeypatch):
    """Simulate a clock: a call takes one second, and one more per token."""
    engine, decode, now = Engine(file), Engine._decode, [0]

    def timed(engine, context, tokens, *arguments, **named):
        now[0] += 1 + len(tokens)
        return decode(engine, context, tokens, *arguments, **named)

    monkeypatch.setattr(Engine, "_decode", timed)
    monkeypatch.setattr(llama_cpp, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert engine.request_seconds(8, 4) == (9, 8)
    engine.close()


def test_llama_cpp_alternates_files_after_warm_up(monkeypatch, tmp_path):
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


def test_llama_cpp_error_of_broken_file(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(EngineError):
        time_requests({"broken": tmp_path / "broken.gguf"}, [(4, 1)], 1)
