"""Tests of timing in vLLM, with a fake `vllm`."""

import json

import pytest
import torch

from darwinlm.engines import vllm
from darwinlm.errors import EngineError

STAND_IN = '''
"""Logs its arguments and generates nothing; a prompt token takes one second, a new token ten."""
import json, pathlib, sys, time

CLOCK = [0]
time.perf_counter = lambda: CLOCK[0]

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
        CLOCK[0] += len(prompts) * (max(lengths) + 10 * sampling.max_tokens)
        print("noise", file=sys.stdout)
        with open(NOTES, "a") as notes:
            ids = [token for prompt in prompts for token in prompt["prompt_token_ids"]]
            note = [pathlib.Path(self.model).name, len(prompts), *lengths, sampling.max_tokens, max(ids)]
            notes.write(json.dumps(note) + "\\n")
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Install a fake `vllm`, and return the file where it logs its arguments."""
    notes = tmp_path / "notes.jsonl"
    (tmp_path / "site" / "vllm").mkdir(parents=True)
    (tmp_path / "site" / "vllm" / "__init__.py").write_text(STAND_IN + f"NOTES = {str(notes)!r}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    return notes


def test_vllm_alternates_models_by_batch_and_length(stand_in, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    folders = {"dense": tmp_path / "a", "pruned": tmp_path / "b"}
    device, times = vllm.time_requests(folders, [(1, 8, 4), (3, 16, 4)], repeats=2, vocabulary=50)
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
    # A prompt with its first token, and four more tokens.
    expected = [(1 * (8 + 10), 1 * 40), (3 * (16 + 10), 3 * 40)]
    assert times == [dict.fromkeys(folders, seconds) for seconds in expected]


def test_vllm_load_error(stand_in, tmp_path):
    with pytest.raises(EngineError, match=r"^ValueError: no model there$"):
        vllm.time_requests({"dense": tmp_path}, [(1, 8, 4)], 1, 50)


def test_vllm_error_names_root_cause(stand_in, tmp_path):
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
        vllm.time_requests({"dense": tmp_path}, [(1, 8, 4)], 1, 50)
