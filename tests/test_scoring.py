"""Scores, trials, recovery and measurements, each against the plain way to get the same number."""

import math

import pytest
import torch
from conftest import VOCABULARY
from transformers import TrainerCallback

from darwinlm.adapters.cutting import Cut, build_model
from darwinlm.errors import UserError
from darwinlm.evaluation.measure import kv_cache_bytes, parameters_of, speeds
from darwinlm.plan import Plan
from darwinlm.recipe import EvaluationRecipe, RecoveryRecipe
from darwinlm.recovery import objective, stage
from darwinlm.recovery.objective import Objective
from darwinlm.recovery.refit import refit
from darwinlm.recovery.stage import recover, remove_checkpoints, steps_for
from darwinlm.scoring import DenseReference
from darwinlm.search import sensitivity
from darwinlm.search.neighbourhood import Neighbourhood
from darwinlm.search.sensitivity import measure_sensitivity
from darwinlm.training import train_briefly

BLOCKS = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(4), dtype=torch.int32)


def halved(dense, database, **kwargs):
    plan = [1 + i % 2 for i in range(len(dense.sites))]
    return build_model(
        dense.config, dense.sites, dense.weights, database.cuts(dense.sites, plan, dense.device), **kwargs
    )


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
        assert near.kl(plan.levels) == pytest.approx(reference.compare(whole).kl, rel=1e-5)


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
            slope = (kl(index, level, 0.02) - kl(index, level, -0.02)) / 0.04
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
    first = train_briefly(model, BLOCKS[:1], learning_rate=1e-2, batch_size=1)
    for _ in range(5):
        last = train_briefly(model, BLOCKS[:1], learning_rate=1e-2, batch_size=1)
    assert last < first
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.weights.items())


def test_a_trial_that_diverges_says_so(pruned):
    dense, database = pruned("llama", "kv_group")
    model = halved(dense, database, trainable=True)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    assert train_briefly(model, BLOCKS, learning_rate=1e-3, batch_size=2) == math.inf


def test_recovery_lowers_the_loss_and_is_the_same_for_the_same_seed(pruned, tmp_path):
    dense, database = pruned("mistral", "kv_group")
    recipe = RecoveryRecipe(tokens=24 * 24, learning_rate=5e-3, batch_size=2)

    def once(seed):
        model = halved(dense, database, trainable=True)
        losses = recover(model, dense.model, BLOCKS, recipe, seed=seed, folder=tmp_path)
        remove_checkpoints(tmp_path)
        return losses, model

    (losses, model), (again, _), (other, _) = once(0), once(0), once(1)
    assert len(losses) == steps_for(recipe, 24) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    assert losses == again != other
    assert not model.training


def test_a_refit_is_ridge_regression_from_what_the_model_computes_to_what_the_stream_lacks(pruned):
    dense, database = pruned("llama", "kv_group")
    weights = {name: tensor.clone() for name, tensor in dense.weights.items()}
    before, model = halved(dense, database), halved(dense, database)
    refit(model, dense.model, BLOCKS)
    assert all(torch.equal(weights[name], tensor) for name, tensor in dense.weights.items())

    def streams(one):
        """Inputs of the first layer's output projections, and the stream after attention and after the layer."""
        seen, layer = {}, one.model.layers[0]
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: seen.update(attention=inputs[0])),
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.update(mlp=inputs[0])),
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: seen.update(middle=inputs[0])),
            layer.register_forward_hook(lambda _, __, output: seen.update(end=output)),
        ]
        one(BLOCKS.long())
        for hook in hooks:
            hook.remove()
        return {name: tensor.detach().flatten(0, 1).double() for name, tensor in seen.items()}

    wanted, old, new = streams(dense.model), streams(before), streams(model)
    middle = wanted["middle"] - old["middle"]
    for kind, module, lacking in [
        ("attention", "self_attn.o_proj", middle),
        ("mlp", "mlp.down_proj", wanted["end"] - (new["end"] - new_output(model, before, new["mlp"]))),
    ]:
        x = old[kind] if kind == "attention" else new[kind]
        gram = x.T @ x
        ridge = 0.3 * gram.diagonal().mean()
        stacked = torch.cat([x, ridge.sqrt() * torch.eye(len(gram), dtype=torch.double)])
        target = torch.cat([lacking, torch.zeros(len(gram), lacking.shape[1], dtype=torch.double)])
        change = torch.linalg.lstsq(stacked, target).solution.T
        layers = [one.model.layers[0].get_submodule(module).weight.double() for one in (model, before)]
        assert torch.allclose(layers[0] - layers[1], change, atol=1e-4 * layers[1].abs().max().item())


def new_output(model, before, x):
    """What the correction of the first MLP adds to the stream."""
    weights = [one.model.layers[0].mlp.down_proj.weight.double() for one in (model, before)]
    return x @ (weights[0] - weights[1]).T


def test_a_refit_of_the_dense_model_changes_nothing(pruned):
    dense, _ = pruned("qwen3", "query_head")
    model = build_model(dense.config, dense.sites, dense.weights, {})
    refit(model, dense.model, BLOCKS)
    for one, other in zip(model.parameters(), dense.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_objective_is_that_of_whole_logits_and_so_is_its_gradient(pruned, share, monkeypatch):
    monkeypatch.setattr(objective, "_CHUNK_TOKENS", 40)
    dense, database = pruned("qwen2", "kv_group")
    ids = BLOCKS.long()
    labels = ids.clone()
    labels[:, :5] = -100
    model, again = (halved(dense, database, trainable=True) for _ in range(2))
    Objective(model, dense.model, share)(ids, labels)["loss"].backward()
    log_q = again(ids).logits.log_softmax(-1)
    log_p = dense.model(ids).logits.log_softmax(-1).detach()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    next_token = torch.nn.functional.cross_entropy(log_q[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    ((1 - share) * next_token + share * kl).backward()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_a_killed_recovery_goes_on_to_the_same_losses_and_weights(pruned, tmp_path, monkeypatch, stop_at):
    dense, database = pruned("llama", "kv_group")
    recipe = RecoveryRecipe(tokens=24 * 24, learning_rate=5e-3, batch_size=2, checkpoint_steps=2)
    whole = halved(dense, database, trainable=True)
    losses = recover(whole, dense.model, BLOCKS, recipe, seed=0, folder=tmp_path / "whole")

    class Killed(BaseException):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop_at:
                raise Killed

    broken = halved(dense, database, trainable=True)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_Advance", lambda progress: Kill())
        with pytest.raises(Killed):
            recover(broken, dense.model, BLOCKS, recipe, seed=0, folder=tmp_path / "broken")
    kept = sorted(path.name for path in (tmp_path / "broken").glob("*"))
    assert kept == ([f"checkpoint-{(stop_at - 1) // 2 * 2}"] if stop_at > 2 else [])
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    resumed = halved(dense, database, trainable=True)
    assert recover(resumed, dense.model, BLOCKS, recipe, seed=0, folder=tmp_path / "broken") == losses
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_recovery_that_diverges_is_one_clear_line(pruned, tmp_path):
    dense, database = pruned("mistral", "kv_group")
    model = halved(dense, database, trainable=True)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(UserError, match=r"recovery diverged at learning rate 0\.001; lower recovery\.learning_rate"):
        recover(model, dense.model, BLOCKS, RecoveryRecipe(tokens=48, learning_rate=1e-3), seed=0, folder=tmp_path)


def test_sizes_and_speeds_are_of_the_model_itself(pruned):
    dense, database = pruned("qwen3", "kv_group")
    model = halved(dense, database)
    cache = model(BLOCKS.long()[:1], use_cache=True).past_key_values
    stored = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers if layer.keys is not None)
    assert kv_cache_bytes(model, torch.bfloat16) == 2 * stored / BLOCKS.shape[1]
    assert parameters_of(model) == sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    timed = speeds({"dense": dense.model, "cut": model}, EvaluationRecipe(prefill_tokens=8, decode_tokens=2, repeats=2))
    assert all(value > 0 for speed in timed.values() for value in speed.values())
