"""Tests of budgets against counters that are independent of plans."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from darwinlm.config.recipe import WorkloadRecipe
from darwinlm.config.target import RESOURCES
from darwinlm.evaluation.measure import kv_cache_bytes, parameters_of
from darwinlm.models.cutting import build_model
from darwinlm.plan import Plan, make_budget
from darwinlm.search.budgets import measure_latencies, resource_limits

WORKLOAD = WorkloadRecipe(batch_size=2, prompt_tokens=20, new_tokens=0)


@pytest.fixture(params=[("llama", "kv_group"), ("qwen3", "query_head")])
def cut(request, pruned, tmp_path):
    """Dense model, its space, a plan with all kinds of levels, the model of that plan, and limits."""
    dense, database = pruned(*request.param)
    space = database.space(dense.sites)
    plan = Plan(levels=tuple((i + 1) % len(site.units) for i, site in enumerate(space.sites)))
    model = build_model(dense.config, dense.sites, dense.weights, database.cuts(dense.sites, plan.levels, dense.device))
    limits = resource_limits(
        dense, space, ["params", "flops", "kv_cache", "memory"], WORKLOAD, tmp_path / "latency.json"
    )
    return dense, space, plan, model, limits


def test_flops_match_pytorch(cut):
    dense, _, plan, model, limits = cut
    model.config._attn_implementation = "eager"  # PyTorch does not count all kernels of the others
    ids = torch.zeros(WORKLOAD.batch_size, WORKLOAD.prompt_tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, logits_to_keep=1)
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    # Batched products are those of attention, and of the head on the last position.
    head = 2 * dense.config.vocab_size * dense.config.hidden_size * WORKLOAD.batch_size
    attention = sum(count for name, count in counts.items() if "bmm" in name) - head
    assert attention > 0
    # PyTorch counts all pairs of positions; a causal model only needs those up to the diagonal.
    tokens = WORKLOAD.prompt_tokens
    expected = sum(counts.values()) - attention + attention * (tokens + 1) / (2 * tokens)
    # Norms and biases count like other parameters.
    vectors = sum(parameter.numel() for parameter in model.model.layers.parameters() if parameter.ndim == 1)
    expected += 2 * vectors * WORKLOAD.batch_size * tokens
    assert limits["flops"].cost(plan.levels) == pytest.approx(expected, rel=1e-3)


def test_parameters_kv_cache_and_memory(cut):
    dense, _, plan, model, limits = cut
    assert limits["params"].cost(plan.levels) == parameters_of(model)
    assert limits["kv_cache"].cost(plan.levels) == kv_cache_bytes(model, dense.dtype)
    tokens = WORKLOAD.batch_size * WORKLOAD.prompt_tokens
    size = dense.dtype.itemsize
    assert limits["memory"].cost(plan.levels) == size * parameters_of(model) + tokens * kv_cache_bytes(
        model, dense.dtype
    )


def test_latencies_stored_in_run(pruned, tmp_path, monkeypatch):
    dense, database = pruned("llama", "kv_group")
    space = database.space(dense.sites)
    sizes = {
        kind: {str(n): 10 * n for site in space.sites if site.kind == kind for n in site.units if n}
        for kind in ("attention", "mlp")
    }
    file = tmp_path / "latency.json"
    file.write_text(json.dumps({"fixed": 70, **sizes}))
    limit = resource_limits(dense, space, ["latency"], WORKLOAD, file)["latency"]
    plan = Plan(levels=tuple(i % len(site.units) for i, site in enumerate(space.sites)))
    kept = sum(site.units[level] for site, level in zip(space.sites, plan.levels, strict=True))
    assert limit.cost(plan.levels) == 70 + 10 * kept
    budget = make_budget({"latency": 0.5}, {"latency": limit})
    assert budget.limits[0].maximum == limit.dense // 2


def test_measure_latencies_times_every_size(pruned):
    dense, database = pruned("qwen2", "kv_group")
    space = database.space(dense.sites)
    table = measure_latencies(dense, space, WorkloadRecipe(prompt_tokens=4, new_tokens=2))
    assert table["fixed"] > 0
    for kind in ("attention", "mlp"):
        sizes = {str(units) for site in space.sites if site.kind == kind for units in site.units} - {"0"}
        assert set(table[kind]) == sizes


def test_resources_have_limits(pruned, tmp_path):
    dense, database = pruned("llama", "kv_group")
    space = database.space(dense.sites)
    (tmp_path / "latency.json").write_text(json.dumps({"fixed": 1, "attention": {}, "mlp": {}}))
    limits = resource_limits(dense, space, RESOURCES, WORKLOAD, tmp_path / "latency.json")
    assert tuple(limits) == RESOURCES
