"""Fused RMSNorm computes what the layers of transformers compute."""

import pytest
import torch
from helpers import FAMILIES, OWN_SETTINGS, VOCABULARY, make_checkpoint

from darwinlm.models import norms
from darwinlm.models.loading import load_dense

CPU = torch.device("cpu")
IDS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def outputs(dense, dtype):
    """Logits of a trainable copy, the gradients of their sum of squares, and its number of replaced norms."""
    model = dense.cut({}, trainable=True).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # Norm weights of a random checkpoint are all one.
                parameter.add_(torch.rand(parameter.shape, generator=generator).to(dtype))
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return logits, gradients, sum(isinstance(module, norms._FusedNorm) for module in model.modules())


@pytest.mark.parametrize("family", sorted(OWN_SETTINGS))
def test_same_logits_and_gradients(family, tmp_path, monkeypatch):
    dense = load_dense(str(make_checkpoint(family, tmp_path)), "kv_group", CPU)
    expected, expected_gradients, none = outputs(dense, torch.float32)
    monkeypatch.setattr(norms, "_DEVICES", {"cpu"})
    found, gradients, replaced = outputs(dense, torch.float32)
    assert none == 0
    assert replaced > 0 or family not in FAMILIES
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-3 * scale + 1e-8, msg=name)


def test_bfloat16_is_as_exact(tmp_path, monkeypatch):
    """Against float32, the fused norms are no further away than those of transformers."""
    dense = load_dense(str(make_checkpoint("llama", tmp_path)), "kv_group", CPU)
    exact, _, _ = outputs(dense, torch.float32)
    plain, _, _ = outputs(dense, torch.bfloat16)
    monkeypatch.setattr(norms, "_DEVICES", {"cpu"})
    fused, _, replaced = outputs(dense, torch.bfloat16)
    assert replaced > 0
    assert fused.dtype == torch.bfloat16
    assert (fused - exact).norm() < 1.1 * (plain - exact).norm()


def test_other_norms_stay(tmp_path, monkeypatch):
    """Gemma's norm multiplies by one plus its weight."""
    monkeypatch.setattr(norms, "_DEVICES", {"cpu"})
    dense = load_dense(str(make_checkpoint("gemma", tmp_path)), "kv_group", CPU)
    assert not any(isinstance(module, norms._FusedNorm) for module in dense.model.modules())


def test_norm_of_another_function_stays(monkeypatch):
    class Shifted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(8)), 1e-5

        def forward(self, states):
            states = states - states.mean(-1, keepdim=True)
            return self.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(norms, "_DEVICES", {"cpu"})
    module = torch.nn.Sequential(Shifted())
    norms.fuse_norms(module, CPU)
    assert type(module[0]) is Shifted
