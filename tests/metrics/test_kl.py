"""Tests of KL and perplexity against the full logits."""

import math

import pytest
import torch
from helpers import VOCABULARY, halved

from darwinlm.metrics.kl import DenseReference

BLOCKS = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(4), dtype=torch.int32)


def test_kl_and_perplexity_match_float64(pruned):
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


def test_kl_of_dense_model_is_zero(pruned):
    dense, database = pruned("qwen2", "kv_group")
    model = halved(dense, database)
    reference = DenseReference(dense.model, BLOCKS)
    assert abs(reference.compare(dense.model).kl) < 1e-6
    assert reference.compare(model, tokens=30).kl == DenseReference(dense.model, BLOCKS[:2]).compare(model).kl


def test_kl_after_out_of_memory(pruned, little_memory, caplog):
    dense, database = pruned("qwen2", "kv_group")
    model = halved(dense, database)
    expected = DenseReference(dense.model, BLOCKS).compare(model)
    seen = little_memory()
    found = DenseReference(dense.model, BLOCKS).compare(model)
    assert found.kl == pytest.approx(expected.kl, rel=1e-5)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert seen == [6, 3] + 12 * [1]
    assert caplog.messages == ["scoring: 6 blocks per pass do not fit in device memory; using 1"]
