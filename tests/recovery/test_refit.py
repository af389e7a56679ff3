"""Tests of the refit against ridge regression, and of its validation on other text."""

import pytest
import torch
from helpers import halved
from recoveries import BLOCKS

from darwinlm.metrics.kl import DenseReference
from darwinlm.models.cutting import build_model
from darwinlm.recovery.refit import refit, refit_if_it_helps


def test_refit_matches_ridge_regression(pruned):
    dense, database = pruned("llama", "kv_group")
    weights = {name: tensor.clone() for name, tensor in dense.weights.items()}
    before, model = halved(dense, database), halved(dense, database)
    refit(model, dense.model, BLOCKS)
    assert all(torch.equal(weights[name], tensor) for name, tensor in dense.weights.items())

    def streams(one):
        """Return inputs of the first layer's output projections, and the stream after attention and after the layer."""
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
    """Return the change of the stream by the correction of the first MLP."""
    weights = [one.model.layers[0].mlp.down_proj.weight.double() for one in (model, before)]
    return x @ (weights[0] - weights[1]).T


def test_refit_of_dense_model_changes_nothing(pruned):
    dense, _ = pruned("qwen3", "query_head")
    model = build_model(dense.config, dense.sites, dense.weights, {})
    refit(model, dense.model, BLOCKS)
    for one, other in zip(model.parameters(), dense.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("harm", [False, True])
def test_refit_undone_when_harmful(harm, pruned, monkeypatch):
    dense, database = pruned("llama", "kv_group")
    model, judge = halved(dense, database), DenseReference(dense.model, BLOCKS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kl = judge.compare(model).kl
    # A text of one word can always be fitted, without any gain on other text.
    text = torch.zeros_like(BLOCKS[:1]) if harm else BLOCKS
    monkeypatch.setattr("darwinlm.recovery.refit._RIDGE", 1e-4 if harm else 0.3)
    assert refit_if_it_helps(model, dense.model, text, BLOCKS) is not harm
    kept = all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert kept is harm
    assert (judge.compare(model).kl < kl) is not harm
