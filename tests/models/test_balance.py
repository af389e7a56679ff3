"""Tests of the load-balancing loss: equal to that of transformers, in trials and recovery, if set by the checkpoint."""

from functools import partial

import pytest
import torch
from helpers import SETTINGS, VOCABULARY, make_checkpoint
from transformers import AutoModelForCausalLM

from darwinlm.config.recipe import RecoveryRecipe
from darwinlm.data.tokens import Tokens
from darwinlm.models.balance import balance_loss, watched_routers
from darwinlm.models.cutting import Cut, build_model, output_columns
from darwinlm.models.families import FAMILIES
from darwinlm.models.loading import load_dense
from darwinlm.pipeline import prune
from darwinlm.recovery.objective import Objective
from darwinlm.recovery.training import recover
from darwinlm.search.trial_training import _gradients, train_briefly

CPU = torch.device("cpu")
MIXTURES = [name for name, family in FAMILIES.items() if family.experts]
BLOCKS = torch.randint(0, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))
asking = partial(make_checkpoint, output_router_logits=True, router_aux_loss_coef=0.5)


def gradients_of(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", MIXTURES)
def test_balance_loss_matches_transformers(family, tmp_path):
    dense = load_dense(str(asking(family, tmp_path)), "kv_group", CPU)
    assert dense.balance == 0.5
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    whole(BLOCKS, labels=BLOCKS).loss.backward()
    expected = gradients_of(whole)

    model = build_model(dense.config, dense.sites, dense.weights, {}, trainable=True)
    loss = Objective(model, None, 0.0, balance=0.5)(BLOCKS, BLOCKS)["loss"]
    torch.testing.assert_close(loss, whole(BLOCKS, labels=BLOCKS).loss)
    loss.backward()
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3)

    # In a trial.
    model.zero_grad()
    parameters = list(model.model.layers.parameters())
    _gradients(model, parameters, parameters, BLOCKS, None, 0.5, None, 3)
    for name, parameter in model.model.layers.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[f"model.layers.{name}"], atol=1e-5, rtol=1e-3)


def test_balance_loss_with_uneven_experts(tmp_path):
    dense = load_dense(str(asking("mixtral", tmp_path)), "kv_group", CPU)
    site = next(site for site in dense.sites if site.routed)
    kept = (0, 2, 5)
    cuts = {site.name: Cut(kept, output_columns(site, dense.weights[site.output_tensor], kept))}
    model = build_model(dense.config, dense.sites, dense.weights, cuts)
    with torch.no_grad(), watched_routers(model) as logits:
        model(BLOCKS)
    assert [len(one_NE[0]) for one_NE in logits] == [3, 6, 6]

    def by_hand(some):
        """Compute E * sum_e f_e P_e (Switch Transformer) over the tokens of all these layers."""
        p_NE = torch.cat(some).softmax(-1)
        goes_NE = torch.zeros_like(p_NE).scatter_(1, p_NE.topk(2, dim=-1).indices, 1.0)
        return p_NE.shape[1] * (goes_NE.mean(0) * p_NE.mean(0)).sum()

    expected = (by_hand(logits[:1]) + 2 * by_hand(logits[1:])) / 3
    torch.testing.assert_close(balance_loss(dense.config, logits), expected)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_balance_from_checkpoint_in_trials_and_recovery(activations, text, tmp_path, monkeypatch):
    seen, tried = [], []

    class Watched(Objective):
        def forward(self, *args, **kwargs):
            seen.append(self._balance)
            return super().forward(*args, **kwargs)

    def watched(*args, **kwargs):
        tried.append(kwargs["balance"])
        return train_briefly(*args, **kwargs)

    monkeypatch.setattr("darwinlm.recovery.training.Objective", Watched)
    monkeypatch.setattr("darwinlm.search.trials.train_briefly", watched)
    folder = asking("olmoe", tmp_path / "dense")
    settings = {**SETTINGS, "data.source": str(text), "recovery.activations": activations}
    prune(folder, target=0.8, out=tmp_path / "run", settings=settings)
    assert set(seen) == set(tried) == {0.5}


def test_balance_setting_overrides_checkpoint(tmp_path):
    """A weight of 0 disables the loss: gradients are those of the other losses."""
    dense = load_dense(str(asking("qwen3_moe", tmp_path / "dense")), "kv_group", CPU)
    ends = []
    for weight, asked in (("auto", 0.0), (0.0, 0.5), (0.5, 0.0), ("auto", 0.5)):
        model = build_model(dense.config, dense.sites, dense.weights, {}, trainable=True)
        recipe = RecoveryRecipe(tokens=32, learning_rate=1e-3, evaluations=0, distillation=0, router_loss=weight)
        folder, text = tmp_path / f"{weight} {asked}", Tokens.unmasked(BLOCKS)
        model, _ = recover(model, None, text, text, recipe, seed=0, folder=folder, device=CPU, balance=asked)
        ends.append(model.get_parameter("model.layers.0.mlp.gate.weight"))
    assert ends[0].equal(ends[1]) and ends[2].equal(ends[3]) and not ends[0].equal(ends[2])
