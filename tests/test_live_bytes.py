"""The counting of bytes by which the memory of large models is known: against sums of shapes, on a small model."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoint

from darwinlm.adapters.config import load_sizes
from darwinlm.adapters.loading import expected_shapes
from darwinlm.settings import load_recipe

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from live_bytes import LiveBytes, trace


def test_a_storage_counts_once_and_until_it_is_freed():
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


@pytest.mark.parametrize("place", ["device", "cpu"])
def test_a_search_is_traced(place, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    settings = {
        "model": str(folder), "target": 0.7, "data.sequence_length": 32, "database.levels": 4, "search.offload": place,
        "search.trial_tokens": [64], "search.score_tokens": [64], "search.survivors": [1],
    }  # fmt: skip
    config = load_sizes(str(folder))
    peaks = {peak.stage: peak for peak in trace(config, load_recipe("quick", settings), 0.7, 80e9)}
    weights = sum(2 * torch.Size(shape).numel() for shape in expected_shapes(config).values())
    ends = sum(2 * torch.Size(s).numel() for name, s in expected_shapes(config).items() if "layers" not in name)
    on_device = weights if place == "device" else ends
    assert len(peaks) == 3
    for peak in peaks.values():
        assert peak.device > on_device
    # Beside the weights there are hidden states and logits of 64 tokens, and one layer where they pass through.
    assert peaks["scores of the dense model"].device < on_device + 200_000
    assert (peaks["candidates: score, trial, score"].host > 0.3 * (weights - ends)) == (place == "cpu")
