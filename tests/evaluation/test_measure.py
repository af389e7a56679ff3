"""Tests of sizes and speeds of a model."""

from types import SimpleNamespace

import pytest
import torch
from helpers import VOCABULARY, halved

from darwinlm.config.recipe import WorkloadRecipe
from darwinlm.evaluation import measure as measure_module
from darwinlm.evaluation.measure import kv_cache_bytes, measure, parameters_of, speeds
from darwinlm.models.walking import CACHE

BLOCKS = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(4), dtype=torch.int32)


def test_parameters_of_and_kv_cache_bytes(pruned):
    dense, database = pruned("qwen3", "kv_group")
    model = halved(dense, database)
    cache = model(BLOCKS.long()[:1], use_cache=True)[CACHE]
    stored = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers if layer.keys is not None)
    assert kv_cache_bytes(model, torch.bfloat16) == 2 * stored / BLOCKS.shape[1]
    assert parameters_of(model) == sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())


def test_speeds_are_tokens_over_seconds(pruned, monkeypatch):
    """Simulate a clock: a pass takes one second, and one more per token, times the cost of the model."""
    dense, database = pruned("qwen3", "kv_group")
    models, costs, now = {"dense": dense.model, "cut": halved(dense, database)}, {"dense": 1.0, "cut": 0.5}, [0.0]

    def wait(cost):
        return lambda model, inputs: now.__setitem__(0, now[0] + cost * (1 + inputs[0].shape[1]))

    monkeypatch.setattr("darwinlm.metrics.latency.time", SimpleNamespace(perf_counter=lambda: now[0]))
    hooks = [model.register_forward_pre_hook(wait(costs[name])) for name, model in models.items()]
    found = speeds(models, WorkloadRecipe(prompt_tokens=8, new_tokens=2))
    for hook in hooks:
        hook.remove()
    for name, cost in costs.items():
        assert found[name]["prefill_tokens_per_second"] == 8 / (9 * cost)
        assert found[name]["decode_tokens_per_second"] == 2 / (2 * 2 * cost)


@pytest.mark.parametrize(("asked", "new"), [(0, 1), (20, 20), (500, 32)])
def test_speeds_are_medians_over_batch(asked, new, pruned, monkeypatch):
    seen, seconds = [], iter([(9.0, 9.0), (0.1, 0.5), (0.4, 4.0), (0.2, 0.1)])

    def time_request(model, **request):
        seen.append(request)
        return next(seconds)

    monkeypatch.setattr(measure_module, "time_request", time_request)
    request = {"batch_size": 3, "prompt_tokens": 8}
    found = speeds({"dense": pruned("qwen3", "kv_group")[0].model}, WorkloadRecipe(**request, new_tokens=asked))
    assert seen == 4 * [{**request, "new_tokens": new}]
    prefill, decode = found["dense"].values()
    assert (prefill, decode) == (pytest.approx(3 * 8 / 0.2), pytest.approx(3 * new / 0.5))


def test_measure_without_memory_for_speeds(pruned, monkeypatch, caplog):
    def time_request(model, **request):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total ...")

    monkeypatch.setattr(measure_module, "time_request", time_request)
    models = {"dense": pruned("qwen3", "kv_group")[0].model}
    (row,) = measure(models, BLOCKS.long(), WorkloadRecipe(batch_size=512), torch.float32)
    assert row["perplexity"] > 1
    assert (row["prefill_tokens_per_second"], row["decode_tokens_per_second"]) == (None, None)
    assert caplog.messages[-1] == (
        "speed: GPU out of memory (Tried to allocate 20.00 GiB): the request in workload is not timed; darwinlm "
        "evaluate --speed times others"
    )
