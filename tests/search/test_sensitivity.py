"""Tests of sensitivities against finite differences and measured KL."""

import pytest
import torch
from helpers import VOCABULARY

from darwinlm.metrics.kl import DenseReference
from darwinlm.models.cutting import Cut, build_model
from darwinlm.plan import Plan
from darwinlm.search import sensitivity
from darwinlm.search.sensitivity import measure_sensitivity

BLOCKS = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(4), dtype=torch.int32)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "granularity"), [("llama", "kv_group"), ("qwen3", "query_head")])
def test_sensitivity_first_order_matches_finite_differences(pruned, family, granularity, monkeypatch):
    monkeypatch.setattr(sensitivity, "fast_dtype", lambda device: torch.float32)
    dense, database = pruned(family, granularity)
    space = database.space(dense.sites)
    base = Plan(levels=tuple(i % len(site.units) for i, site in enumerate(space.sites)))

    def cut(index, level):
        return database.cut(dense.sites[index], level, dense.device)

    found = measure_sensitivity(dense, cut, space, base, BLOCKS, draws=400, seed=0)
    reference = DenseReference(dense.model, BLOCKS)

    def wide(index, level):
        """Return a level's output projection, padded to the dense width, and its bias."""
        site, last = dense.sites[index], len(space.sites[index].units) - 1
        weight, bias = (dense.weights.get(f"{site.output}.{kind}") for kind in ("weight", "bias"))
        whole = torch.zeros_like(weight)
        if level == 0:
            whole = weight
        elif level < last:
            kept, width = cut(index, level).kept, site.columns_per_unit
            columns = [unit * width + column for unit in kept for column in range(width)]
            whole[:, columns] = cut(index, level).output_weight
        return whole, bias * (level < last) if bias is not None else None

    def kl(index=0, level=0, share=0.0):
        """Return the KL of the base plan with one site moved by `share` towards another level."""
        weights = dict(dense.weights)
        for i, (site, here) in enumerate(zip(dense.sites, base.levels, strict=True)):
            for kind, there, start in zip(("weight", "bias"), wide(i, level), wide(i, here), strict=True):
                if start is not None:
                    moved = share * (there - start) if i == index else 0
                    weights[f"{site.output}.{kind}"] = start + moved
        with torch.no_grad():
            p = dense.model(BLOCKS.long()).logits.double().log_softmax(-1)
            q = build_model(dense.config, dense.sites, weights, {})(BLOCKS.long()).logits.double().log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean().item()

    assert reference.compare(build_model(
        dense.config, dense.sites, dense.weights, database.cuts(dense.sites, base.levels, dense.device)
    )).kl == pytest.approx(kl(), rel=1e-4)  # fmt: skip
    for index, site in enumerate(space.sites):
        for level in range(len(site.units)):
            near, far = ((kl(index, level, h) - kl(index, level, -h)) / (2 * h) for h in (0.01, 0.02))
            slope = (4 * near - far) / 3  # Richardson extrapolation cancels the cubic term
            assert found.first[index][level] == pytest.approx(slope, rel=0.02, abs=2e-4)


@pytest.mark.slow
def test_sensitivity_second_order_matches_kl(pruned, monkeypatch):
    """Without a first order, KL is half the Fisher form: the sampled form must agree with measured KL."""
    monkeypatch.setattr(sensitivity, "fast_dtype", lambda device: torch.float32)
    dense, database = pruned("mistral", "kv_group")
    space = database.space(dense.sites)

    def nearly_dense(index, level):
        found = database.cut(dense.sites[index], level, dense.device)
        return Cut(found.kept, found.output_weight)

    base = Plan(levels=(0,) * len(space.sites))
    found = measure_sensitivity(dense, nearly_dense, space, base, BLOCKS, draws=600, seed=0)
    assert all(abs(one) < 1e-5 for row in found.first for one in row)
    assert all(row[0] == 0 for row in found.second)
    reference = DenseReference(dense.model, BLOCKS)
    index = min(range(len(space.sites)), key=lambda i: found.second[i][1])
    plan = Plan(levels=tuple(int(i == index) for i in range(len(space.sites))))
    cuts = database.cuts(dense.sites, plan.levels, dense.device)
    measured = reference.compare(build_model(dense.config, dense.sites, dense.weights, cuts)).kl
    assert found.second[index][1] == pytest.approx(measured, rel=0.5)
