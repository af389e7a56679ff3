"""Tests of signSGD in trials: AdamW's first step, taken during the backward pass, unbiased in bfloat16."""

import weakref

import pytest
import torch
from helpers import VOCABULARY

from darwinlm.config.recipe import SearchRecipe
from darwinlm.metrics.kl import DenseReference
from darwinlm.models.cutting import build_model
from darwinlm.models.device_memory import Portion
from darwinlm.optim import sign_sgd
from darwinlm.optim.learning_rate import LearningRate
from darwinlm.optim.sign_sgd import SignSGD
from darwinlm.search import trial_training
from darwinlm.search.trial_training import train_briefly

BLOCKS = torch.randint(0, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
SIGN = {"optimizer": "sign", "rate": LearningRate(2.0**-8, relative=True), "batch_size": 4}


@pytest.fixture
def halved(pruned):
    """Return a function that builds a model at half its size, in a dtype."""
    dense, database = pruned("qwen3", "kv_group")
    cuts = database.cuts(
        dense.sites, [len(levels.units) // 2 for levels in database.space(dense.sites).sites], dense.device
    )

    def get(dtype=torch.float32):
        return build_model(
            dense.config, dense.sites, dense.weights, cuts, trainable=True, shared_ends=True, dtype=dtype
        )

    return dense, get


def in_dtype(monkeypatch, dtype):
    monkeypatch.setattr(trial_training, "fast_dtype", lambda device: dtype)


def layers_of(model):
    return dict(model.model.layers.named_parameters())


@pytest.mark.parametrize("together", [1, 500, 10**7])
@pytest.mark.parametrize("loss", ["next-token", "distillation"])
def test_sign_step_matches_first_adamw_step(loss, together, halved, monkeypatch):
    in_dtype(monkeypatch, torch.float32)
    monkeypatch.setattr(sign_sgd, "TOGETHER", together)
    dense, get = halved
    target_rows_BTD = DenseReference(dense.model, BLOCKS).mean_head_rows() if loss == "distillation" else None
    ours, theirs = get(), get()
    start = {name: tensor.detach().clone() for name, tensor in layers_of(ours).items()}
    assert train_briefly(ours, BLOCKS, target_rows_BTD=target_rows_BTD, **SIGN)
    assert train_briefly(theirs, BLOCKS, target_rows_BTD=target_rows_BTD, **SIGN | {"optimizer": "adamw"})
    for name, tensor in layers_of(theirs).items():
        assert not torch.equal(tensor, start[name])
        torch.testing.assert_close(layers_of(ours)[name] - start[name], tensor - start[name], atol=2e-6, rtol=1e-3)


def test_sign_absolute_rate(halved, monkeypatch):
    in_dtype(monkeypatch, torch.float32)
    _, get = halved
    model = get()
    start = {name: tensor.detach().clone() for name, tensor in layers_of(model).items()}
    assert train_briefly(model, BLOCKS, **SIGN | {"rate": LearningRate(1e-3)})
    for name, tensor in layers_of(model).items():
        assert (tensor.detach() - start[name]).abs().median().item() == pytest.approx(1e-3, rel=1e-2)


def test_sign_steps_in_bfloat16_unbiased():
    """Steps are far below the distance to the next number, so that rounding to nearest would drop them."""
    weight = torch.nn.Parameter(torch.full((200_000,), 1.0, dtype=torch.bfloat16))
    nearest = (weight.detach().float() - 2.0**-10).bfloat16()
    assert torch.equal(nearest, weight.detach())
    signs = SignSGD([weight], LearningRate(2.0**-10), weight.device)
    signs.begin()
    (weight.float() * torch.tensor([1.0, -1.0]).repeat(100_000)).sum().backward()
    signs.end()
    assert signs.close()
    moved = weight.detach().float() - 1
    assert set(moved[::2].tolist()) == {0.0, -(2.0**-8)} and set(moved[1::2].tolist()) == {0.0, 2.0**-7}
    assert moved[::2].mean().item() == pytest.approx(-(2.0**-10), rel=0.05)
    assert moved[1::2].mean().item() == pytest.approx(2.0**-10, rel=0.05)


def test_sign_trial_in_bfloat16(halved, monkeypatch):
    dense, get = halved
    target_rows_BTD, judge = DenseReference(dense.model, BLOCKS).mean_head_rows(), DenseReference(dense.model, BLOCKS)
    before, gains = judge.compare(get()).kl, {}
    for dtype in (torch.float32, torch.bfloat16):
        in_dtype(monkeypatch, dtype)
        model = get(dtype)
        assert train_briefly(model, BLOCKS, target_rows_BTD=target_rows_BTD, **SIGN | {"batch_size": 1})
        assert all(tensor.dtype == dtype for tensor in layers_of(model).values())
        gains[dtype] = before - judge.compare(model, head=dense.head).kl
    assert gains[torch.float32] > 0.01
    assert gains[torch.bfloat16] == pytest.approx(gains[torch.float32], rel=0.3)


def test_sign_trial_reproducible(halved, monkeypatch):
    in_dtype(monkeypatch, torch.bfloat16)
    _, get = halved
    one, other = get(torch.bfloat16), get(torch.bfloat16)
    for model in (one, other):
        assert train_briefly(model, BLOCKS, **SIGN | {"batch_size": 1})
        torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_sign_gradients_freed_during_backward(halved, monkeypatch):
    in_dtype(monkeypatch, torch.bfloat16)
    monkeypatch.setattr(sign_sgd, "TOGETHER", 1)
    _, get = halved
    model, alive, most = get(torch.bfloat16), weakref.WeakSet(), []

    def count(parameter):
        alive.add(parameter.grad)
        most.append(len(alive))

    for parameter in layers_of(model).values():
        parameter.register_post_accumulate_grad_hook(count)
    assert train_briefly(model, BLOCKS, **SIGN)
    assert len(most) == len(layers_of(model)) and max(most) <= 3
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sign_step_in_parts(halved, monkeypatch):
    in_dtype(monkeypatch, torch.float32)
    _, get = halved
    whole, parts = get(), get()
    assert train_briefly(whole, BLOCKS, **SIGN)
    assert train_briefly(parts, BLOCKS, **SIGN, portion=Portion(1, "search"))
    moved = torch.cat([(a - b).flatten() for a, b in zip(whole.parameters(), parts.parameters(), strict=True)])
    assert moved.abs().max() < 1e-4


def test_sign_trial_out_of_memory_restarts_in_parts(halved, little_memory, monkeypatch):
    in_dtype(monkeypatch, torch.float32)
    _, get = halved
    start, whole, parts = get(), get(), get()
    assert train_briefly(whole, BLOCKS, **SIGN)
    little_memory()
    assert train_briefly(parts, BLOCKS, **SIGN)
    moved = [
        torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), start.parameters(), strict=True)])
        for model in (whole, parts)
    ]
    assert torch.linalg.norm(moved[0] - moved[1]) < 0.05 * torch.linalg.norm(moved[0])


def test_sign_partial_step_out_of_memory(halved, monkeypatch):
    in_dtype(monkeypatch, torch.float32)
    monkeypatch.setattr(sign_sgd, "TOGETHER", 1)
    _, get = halved
    model = get()

    def fail(parameter):
        raise torch.OutOfMemoryError

    # The gradient of the first layer is computed last.
    model.model.layers[0].input_layernorm.weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(MemoryError, match="in the middle of a step"):
        train_briefly(model, BLOCKS, **SIGN)


def test_offload_needs_sign_and_memory():
    with pytest.raises(ValueError, match=r"search\.offload=cpu needs search\.trial_optimizer=sign"):
        SearchRecipe(trial_tokens=(0, 0), learning_rate=1e-4, offload="cpu", forecast_candidates=3)
    assert not SearchRecipe(learning_rate=1e-4).offloads(10, 0, 1, accelerator=True)
    assert SearchRecipe().offloads(10, 0, 19, accelerator=True)
    assert not SearchRecipe().offloads(10, 0, 21, accelerator=True)
    assert SearchRecipe().offloads(10, 2, 21, accelerator=True) and not SearchRecipe().offloads(
        9, 9, 1, accelerator=False
    )


def test_sign_nonfinite_gradient(halved, monkeypatch):
    in_dtype(monkeypatch, torch.bfloat16)
    _, get = halved
    model = get(torch.bfloat16)
    layers_of(model)["0.mlp.up_proj.weight"].data[0, 0] = torch.inf
    assert not train_briefly(model, BLOCKS, **SIGN)


def test_sign_is_auto_with_auto_rate():
    assert SearchRecipe().optimizer == "sign"
    assert SearchRecipe(learning_rate=1e-5).optimizer == "adamw"
    assert SearchRecipe(learning_rate=1e-5, trial_optimizer="sign").optimizer == "sign"
    assert SearchRecipe(trial_optimizer="adamw").optimizer == "adamw"
