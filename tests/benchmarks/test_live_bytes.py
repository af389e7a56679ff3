"""Tests of the memory trace of large models: a small model against sums of shapes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_checkpoint

from darwinlm.models.config import load_sizes
from darwinlm.models.loading import expected_shapes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from live_bytes import LiveBytes  # noqa: E402


def test_live_bytes_counts_storages_once():
    with LiveBytes() as live:
        whole = torch.empty(10, 100)
        views = [whole[:3], whole.t()]
        assert live.now["cpu"] == 4000
        other = whole + 1
        assert live.now["cpu"] == 8000
        del whole, views
        assert live.now["cpu"] == 4000 and live.peak["cpu"] == 8000
        del other
        assert live.now["cpu"] == 0


TRACE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from live_bytes import trace
from darwinlm.models.config import load_sizes
from darwinlm.config.loading import load_recipe
settings = json.loads(sys.argv[2])
found = trace(load_sizes(settings["model"]), load_recipe("quick", settings), settings["target"], 80e9)
print(json.dumps({peak.stage: [peak.device, peak.host] for peak in found}))
"""
"""Script for a separate process, because what is cached there, such as masks, has no content."""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["device", "cpu"])
def test_trace_of_search(place, tmp_path):
    settings = {
        "model": str(make_checkpoint("llama", tmp_path)), "target": 0.7, "data.sequence_length": 32,
        "database.levels": 4, "search.offload": place, "search.trial_tokens": [64], "search.score_tokens": [64],
        "search.survivors": [1],
    }  # fmt: skip
    command = [sys.executable, "-c", TRACE, str(BENCHMARKS), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    shapes = expected_shapes(load_sizes(settings["model"]))
    weights = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    ends = sum(2 * torch.Size(shape).numel() for name, shape in shapes.items() if "layers" not in name)
    on_device = weights if place == "device" else ends
    assert len(peaks) == 3
    for device, _ in peaks.values():
        assert device > on_device
    # In addition to the weights: hidden states and logits of 64 tokens, and one layer if layers are streamed.
    assert peaks["scores of the dense model"][0] < on_device + 200_000
    assert (peaks["candidates: score, trial, score"][1] > 0.3 * (weights - ends)) == (place == "cpu")
