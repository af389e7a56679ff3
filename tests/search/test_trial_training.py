"""Scores, trials and measurements, each against the plain way to get the same number."""

import math

import pytest
import torch
from helpers import VOCABULARY, apart, halved

from darwinlm.config.recipe import WorkloadRecipe
from darwinlm.evaluation import measure as measuring
from darwinlm.evaluation.measure import kv_cache_bytes, measure, parameters_of, speeds
from darwinlm.metrics.kl import DenseReference
from darwinlm.models.cutting import Cut, build_model
from darwinlm.models.device_memory import Portion
from darwinlm.models.walking import CACHE
from darwinlm.optim.learning_rate import LearningRate
from darwinlm.plan import Plan
from darwinlm.search import sensitivity
from darwinlm.search import trial_training as training
from darwinlm.search.neighbourhood import Neighbourhood
from darwinlm.search.sensitivity import measure_sensitivity
from darwinlm.search.trial_training import train_briefly

BLOCKS = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(4), dtype=torch.int32)


def test_kl_and_perplexity_are_those_of_the_full_logits_in_float64(pruned):
    dense, database = pruned("qwen2", "kv_group")
    model = halved(dense, database)
    with torch.no_grad():
        p = dense.model(BLOCKS.long()).logits.double().log_softmax(-1)
        q = model(BLOCKS.long()).logits.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    loss = -q[:, :-1].gather(-1, BLOCKS[:, 1:, None].long()).mean().item()
    found = DenseReference(dense.model, BLOCKS).compare(model)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_model_is_at_no_distance_from_itself_and_a_prefix_is_a_prefix(pruned):
    dense, database = pruned("qwen2", "kv_group")
    model = halved(dense, database)
    reference = DenseReference(dense.model, BLOCKS)
    assert abs(reference.compare(dense.model).kl) < 1e-6
    assert reference.compare(model, tokens=30).kl == DenseReference(dense.model, BLOCKS[:2]).compare(model).kl


def one_level_away(space, base, index):
    level = base.levels[index]
    moved = level + 1 if level + 1 < len(space.sites[index].units) else level - 1
    return Plan(levels=(*base.levels[:index], moved, *base.levels[index + 1 :]))


def test_a_plan_near_another_is_scored_as_if_cut_whole(pruned):
    dense, database = pruned("mistral", "query_head")
    base = Plan(levels=tuple(i % 3 for i in range(len(dense.sites))))
    reference = DenseReference(dense.model, BLOCKS)
    near = Neighbourhood(dense, reference, lambda i, k: database.cut(dense.sites[i], k, dense.device), base)
    space = database.space(dense.sites)
    one_off = [one_level_away(space, base, index) for index in range(len(space.sites))]
    for plan in [base, *one_off, Plan(levels=tuple(len(site.units) - 1 for site in space.sites))]:
        cuts = database.cuts(dense.sites, plan.levels, dense.device)
        whole = build_model(dense.config, dense.sites, dense.weights, cuts)
        assert near.compare(plan.levels).kl == pytest.approx(reference.compare(whole).kl, rel=1e-5)


@pytest.mark.parametrize(("family", "granularity"), [("llama", "kv_group"), ("qwen3", "query_head")])
def test_sensitivities_are_the_derivatives_of_kl_by_the_share_of_a_level(pruned, family, granularity, monkeypatch):
    monkeypatch.setattr(sensitivity, "fast_dtype", lambda device: torch.float32)
    dense, database = pruned(family, granularity)
    space = database.space(dense.sites)
    base = Plan(levels=tuple(i % len(site.units) for i, site in enumerate(space.sites)))

    def cut(index, level):
        return database.cut(dense.sites[index], level, dense.device)

    found = measure_sensitivity(dense, cut, space, base, BLOCKS, draws=400, seed=0)
    reference = DenseReference(dense.model, BLOCKS)

    def wide(index, level):
        """A level's output projection, as wide as the dense one."""
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
        """Of the base plan, one site a small share of the way to another level."""
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
            slope = (4 * near - far) / 3  # Richardson: a cubic term cancels
            assert found.first[index][level] == pytest.approx(slope, rel=0.02, abs=2e-4)


def test_near_the_dense_model_the_second_order_is_the_whole_change(pruned, monkeypatch):
    """Without a first order, KL is half the Fisher form: the sampled one must agree with KL measured directly."""
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


def test_a_trial_trains_the_candidate_and_leaves_the_dense_model_alone(pruned):
    dense, database = pruned("llama", "query_head")
    before = {name: tensor.clone() for name, tensor in dense.weights.items()}
    model = halved(dense, database, trainable=True)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    first = model(BLOCKS[:1], labels=BLOCKS[:1].long()).loss.item()
    for _ in range(6):
        assert train_briefly(model, BLOCKS[:1], rate=LearningRate(1e-2), batch_size=1)
    assert model(BLOCKS[:1], labels=BLOCKS[:1].long()).loss.item() < first - 0.1
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.weights.items())


@pytest.mark.parametrize("loss", ["next-token", "distillation"])
def test_a_trial_follows_the_gradient_of_its_loss(loss, pruned, monkeypatch):
    dense, database = pruned("llama", "kv_group")
    model = halved(dense, database, trainable=True)
    log_q = model(BLOCKS).logits[:, :-1].log_softmax(-1)
    if loss == "next-token":
        value = torch.nn.functional.nll_loss(log_q.flatten(0, 1), BLOCKS[:, 1:].long().flatten())
    else:
        log_p = dense.model(BLOCKS).logits[:, :-1].log_softmax(-1)
        value = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    layers = list(model.model.layers.parameters())
    expected = torch.autograd.grad(value, layers)
    norm = torch.stack([gradient.norm() for gradient in expected]).norm().clamp_min(1)
    seen = []
    monkeypatch.setattr(training, "fast_dtype", lambda device: torch.float32)
    monkeypatch.setattr(
        training.Adam, "step", lambda one: seen.extend(tensor.grad for part in one._parts for tensor, _, _ in part)
    )
    aims = DenseReference(dense.model, BLOCKS).mean_head_rows() if loss == "distillation" else None
    arguments = {"rate": LearningRate(1e-3), "batch_size": len(BLOCKS), "portion": Portion(2, "search")}
    assert train_briefly(model, BLOCKS, target_rows_BTD=aims, **arguments)
    for found, gradient in zip(seen, expected, strict=True):
        assert torch.allclose(found, gradient / norm, rtol=1e-3, atol=1e-6)


def test_a_trial_that_diverges_says_so(pruned):
    dense, database = pruned("llama", "kv_group")
    model = halved(dense, database, trainable=True)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    assert not train_briefly(model, BLOCKS, rate=LearningRate(1e-3), batch_size=2)


def test_a_trial_with_little_memory_ends_at_the_same_weights(pruned, monkeypatch):
    dense, database = pruned("qwen3", "kv_group")
    plenty, little = (halved(dense, database, trainable=True) for _ in range(2))
    train_briefly(plenty, BLOCKS, rate=LearningRate(1e-3), batch_size=2)
    recomputed = []
    monkeypatch.setattr("darwinlm.search.trial_training.free_memory", lambda device: 1)
    enable = type(little).activation_checkpointing_enable
    monkeypatch.setattr(
        type(little), "activation_checkpointing_enable", lambda *args: (recomputed.append(True), enable(*args))
    )
    train_briefly(little, BLOCKS, rate=LearningRate(1e-3), batch_size=2)
    assert recomputed
    assert all(torch.equal(one, other) for one, other in zip(plenty.parameters(), little.parameters(), strict=True))


def test_a_trial_that_runs_out_of_memory_takes_the_same_steps_in_parts(pruned, little_memory, caplog):
    dense, database = pruned("qwen3", "kv_group")
    start, whole, parts = (halved(dense, database, trainable=True) for _ in range(3))
    arguments = {"rate": LearningRate(1e-3), "batch_size": 4}
    assert train_briefly(whole, BLOCKS, **arguments)
    seen, portion = little_memory(), Portion(4, "search")
    assert train_briefly(parts, BLOCKS, **arguments, portion=portion)
    assert seen == [4, 2, 2, 1, 1, 1, 1, 1, 1]
    assert apart((whole, parts), start) < 0.01
    # What was learnt holds for the next candidate, and is said once.
    train_briefly(halved(dense, database, trainable=True), BLOCKS, **arguments, portion=portion)
    assert seen[9:] == [1] * 6
    assert caplog.messages == ["search: 4 blocks per pass do not fit in device memory; using 1"]


def test_a_trial_in_bfloat16_adds_up_its_parts_in_float32(pruned, monkeypatch):
    dense, database = pruned("qwen3", "kv_group")
    monkeypatch.setattr(training, "fast_dtype", lambda device: torch.bfloat16)
    added = []
    step = training.Adam.step

    def watched(optimizer):
        added.append([tensor.grad.clone() for part in optimizer._parts for tensor, _, _ in part])
        return step(optimizer)

    monkeypatch.setattr(training.Adam, "step", watched)
    for parts in (Portion(1, "search"), None):
        model = halved(dense, database, trainable=True)
        train_briefly(model, BLOCKS[:4], rate=LearningRate(1e-3), batch_size=4, portion=parts)
    for one, other in zip(*added, strict=True):
        assert one.dtype == torch.float32
        assert torch.linalg.norm(one - other) < 0.02 * torch.linalg.norm(other)


def test_a_score_that_runs_out_of_memory_is_the_same(pruned, little_memory, caplog):
    dense, database = pruned("qwen2", "kv_group")
    model = halved(dense, database)
    expected = DenseReference(dense.model, BLOCKS).compare(model)
    seen = little_memory()
    found = DenseReference(dense.model, BLOCKS).compare(model)
    assert found.kl == pytest.approx(expected.kl, rel=1e-5)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert seen == [6, 3] + 12 * [1]
    assert caplog.messages == ["scoring: 6 blocks per pass do not fit in device memory; using 1"]


def test_sizes_and_speeds_are_of_the_model_itself(pruned):
    dense, database = pruned("qwen3", "kv_group")
    model = halved(dense, database)
    cache = model(BLOCKS.long()[:1], use_cache=True)[CACHE]
    stored = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers if layer.keys is not None)
    assert kv_cache_bytes(model, torch.bfloat16) == 2 * stored / BLOCKS.shape[1]
    assert parameters_of(model) == sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    timed = speeds({"dense": dense.model, "cut": model}, WorkloadRecipe(prompt_tokens=8, new_tokens=2))
    assert all(value > 0 for speed in timed.values() for value in speed.values())


@pytest.mark.parametrize(("asked", "new"), [(0, 1), (20, 20), (500, 32)])
def test_speeds_count_the_tokens_of_all_requests_and_are_medians(asked, new, pruned, monkeypatch):
    seen, seconds = [], iter([(9.0, 9.0), (0.1, 0.5), (0.4, 4.0), (0.2, 0.1)])

    def time_request(model, **request):
        seen.append(request)
        return next(seconds)

    monkeypatch.setattr(measuring, "time_request", time_request)
    request = {"batch_size": 3, "prompt_tokens": 8}
    found = speeds({"dense": pruned("qwen3", "kv_group")[0].model}, WorkloadRecipe(**request, new_tokens=asked))
    assert seen == 4 * [{**request, "new_tokens": new}]
    prefill, decode = found["dense"].values()
    assert (prefill, decode) == (pytest.approx(3 * 8 / 0.2), pytest.approx(3 * new / 0.5))


def test_a_request_that_does_not_fit_in_memory_costs_only_the_speeds(pruned, monkeypatch, caplog):
    def time_request(model, **request):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total ...")

    monkeypatch.setattr(measuring, "time_request", time_request)
    models = {"dense": pruned("qwen3", "kv_group")[0].model}
    (row,) = measure(models, BLOCKS.long(), WorkloadRecipe(batch_size=512), torch.float32)
    assert row["perplexity"] > 1
    assert (row["prefill_tokens_per_second"], row["decode_tokens_per_second"]) == (None, None)
    assert caplog.messages[-1] == (
        "speed: GPU out of memory (Tried to allocate 20.00 GiB): the request in workload is not timed; darwinlm "
        "evaluate --speed times others"
    )
