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
from live_stages import Trace, fake_ranks
from darwinlm.models.config import load_sizes
from darwinlm.config.loading import load_recipe
settings, ranks = json.loads(sys.argv[2]), int(sys.argv[3])
with fake_ranks(ranks):
    recipe = load_recipe("quick", settings)
    trace = Trace(load_sizes(settings["model"]), recipe, settings["target"], 80e9, ranks)
    peaks = {stage: trace.peak(stage) for stage in (sys.argv[4:] or trace.stages())}
print(json.dumps({stage: [peak.device, peak.host] for stage, peak in peaks.items()}))
"""
"""Script for a separate process, because what is cached there, such as masks, has no content."""


def traced(folder, *stages, ranks=1, **sizes):
    """Peaks on the device and the host by stage, and the parameters of layers and of the rest."""
    settings = {
        "model": str(make_checkpoint("mistral", folder, **sizes)), "target": 0.7, "data.sequence_length": 32,
        "data.calibration_tokens": 2048, "database.levels": 8, "database.batch_size": 2, "search.trial_tokens": [64],
        "search.score_tokens": [64], "search.survivors": [1], "recovery.refit_tokens": 64,
        "recovery.micro_batch_size": 1,
    }  # fmt: skip
    shapes = expected_shapes(load_sizes(settings["model"]))
    numbers = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    layers = sum(number for name, number in numbers.items() if "layers" in name)

    def peaks(*names, **changes):
        changed = json.dumps(settings | {key.replace("__", "."): value for key, value in changes.items()})
        command = [sys.executable, "-c", TRACE, str(BENCHMARKS), changed, str(ranks), *names]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return peaks, layers, sum(numbers.values()) - layers


@pytest.mark.slow
@pytest.mark.parametrize("place", ["device", "cpu"])
def test_trace_of_search(place, tmp_path):
    peaks, layers, ends = traced(tmp_path)
    stages = "scores of the dense model", "sensitivities", "score, trial, score"
    found = peaks(*stages, search__offload=place)
    on_device = 2 * (layers + ends) if place == "device" else 2 * ends
    assert all(device > on_device for device, _ in found.values())
    # In addition to the weights: hidden states and logits of 64 tokens, and one layer if layers are streamed.
    assert found["scores of the dense model"][0] < on_device + 200_000
    assert (found["score, trial, score"][1] > 0.6 * layers) == (place == "cpu")


@pytest.mark.slow
def test_trace_of_database(tmp_path):
    """On the device a layer in bfloat16 and its matrices, whatever the depth; in CPU memory all hidden states."""
    found = [
        traced(tmp_path / str(layers), num_hidden_layers=layers, intermediate_size=1024)[0]("database")["database"]
        for layers in (2, 4)
    ]
    assert found[0] == found[1]
    device, host = found[0]
    assert 2 * 4 * 1024**2 < device < 8 * 4 * 1024**2
    states, ends = 2 * 2048 * 48, 2 * 259 * 48
    assert states + ends <= host < states + ends + 2 * 3 * 1024 * 48 * 4


@pytest.mark.slow
def test_trace_of_refit_and_evaluation(tmp_path):
    peaks, layers, ends = traced(tmp_path)
    whole, streamed = peaks("refit", "evaluation"), peaks("refit", "evaluation", search__offload="cpu")
    # The dense model in bfloat16 and the pruned one in float32; without layers, only the ends of both.
    assert whole["refit"][0] > 2 * (layers + ends) + 4 * (0.6 * layers + ends)
    assert 2 * ends < streamed["refit"][0] < whole["refit"][0] - 2 * layers
    # The dense model and three of 70%; streamed models share embeddings and head.
    assert whole["evaluation"][0] > 2 * (layers + ends) + 3 * 2 * (0.5 * layers)
    assert 2 * ends < streamed["evaluation"][0] < whole["evaluation"][0] - 2 * layers


@pytest.mark.slow
def test_trace_of_training(tmp_path):
    """16 bytes for a parameter, divided by the number of ranks; the embeddings are gathered."""
    peaks, layers, ends = traced(tmp_path, num_hidden_layers=8, hidden_size=96, intermediate_size=512)
    settings = {"recovery__distillation": 0.0, "recovery__activations": "recompute"}
    whole = peaks("training", **settings)["training"][0]
    left = 0.7 * (layers + ends)
    assert 16 * left < whole < 16 * left + 6e6
    peaks, _, _ = traced(tmp_path, ranks=4, num_hidden_layers=8, hidden_size=96, intermediate_size=512)
    sharded = peaks("training", **settings, recovery__sharding="fsdp")["training"][0]
    assert 16 * left / 4 < sharded < 16 * left / 4 + 8 * ends + 6e6
    device, host = peaks("training", **settings, recovery__sharding="fsdp_offload")["training"]
    assert device < sharded - 8 * left / 4
    assert host == pytest.approx(16 * left / 4, rel=0.1)
