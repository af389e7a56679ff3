"""Tests of trial training: steps against plain gradients, little memory, divergence."""

import pytest
import torch
from helpers import VOCABULARY, apart, halved

from darwinlm.metrics.kl import DenseReference
from darwinlm.models.device_memory import Portion
from darwinlm.optim.learning_rate import LearningRate
from darwinlm.search import trial_training
from darwinlm.search.trial_training import train_briefly

BLOCKS = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(4), dtype=torch.int32)


def test_train_briefly_leaves_dense_model(pruned):
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
def test_train_briefly_gradients(loss, pruned, monkeypatch):
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
    monkeypatch.setattr(trial_training, "fast_dtype", lambda device: torch.float32)
    monkeypatch.setattr(
        trial_training.Adam,
        "step",
        lambda one: seen.extend(tensor.grad for part in one._parts for tensor, _, _ in part),
    )
    aims = DenseReference(dense.model, BLOCKS).mean_head_rows() if loss == "distillation" else None
    arguments = {"rate": LearningRate(1e-3), "batch_size": len(BLOCKS), "portion": Portion(2, "search")}
    assert train_briefly(model, BLOCKS, target_rows_BTD=aims, **arguments)
    for found, gradient in zip(seen, expected, strict=True):
        assert torch.allclose(found, gradient / norm, rtol=1e-3, atol=1e-6)


def test_train_briefly_diverged(pruned):
    dense, database = pruned("llama", "kv_group")
    model = halved(dense, database, trainable=True)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    assert not train_briefly(model, BLOCKS, rate=LearningRate(1e-3), batch_size=2)


def test_train_briefly_recomputes_with_little_memory(pruned, monkeypatch):
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


def test_train_briefly_out_of_memory_splits_batches(pruned, little_memory, caplog):
    dense, database = pruned("qwen3", "kv_group")
    start, whole, parts = (halved(dense, database, trainable=True) for _ in range(3))
    arguments = {"rate": LearningRate(1e-3), "batch_size": 4}
    assert train_briefly(whole, BLOCKS, **arguments)
    seen, portion = little_memory(), Portion(4, "search")
    assert train_briefly(parts, BLOCKS, **arguments, portion=portion)
    assert seen == [4, 2, 2, 1, 1, 1, 1, 1, 1]
    assert apart((whole, parts), start) < 0.01
    # The number of blocks is kept for the next candidate, and reported once.
    train_briefly(halved(dense, database, trainable=True), BLOCKS, **arguments, portion=portion)
    assert seen[9:] == [1] * 6
    assert caplog.messages == ["search: 4 blocks per pass do not fit in device memory; using 1"]


def test_train_briefly_bfloat16_accumulates_in_float32(pruned, monkeypatch):
    dense, database = pruned("qwen3", "kv_group")
    monkeypatch.setattr(trial_training, "fast_dtype", lambda device: torch.bfloat16)
    added = []
    step = trial_training.Adam.step

    def watched(optimizer):
        added.append([tensor.grad.clone() for part in optimizer._parts for tensor, _, _ in part])
        return step(optimizer)

    monkeypatch.setattr(trial_training.Adam, "step", watched)
    for parts in (Portion(1, "search"), None):
        model = halved(dense, database, trainable=True)
        train_briefly(model, BLOCKS[:4], rate=LearningRate(1e-3), batch_size=4, portion=parts)
    for one, other in zip(*added, strict=True):
        assert one.dtype == torch.float32
        assert torch.linalg.norm(one - other) < 0.02 * torch.linalg.norm(other)
