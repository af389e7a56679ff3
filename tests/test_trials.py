"""Trials: what they gain does not depend on how weights are scaled, how fast they are is found, and it is told."""

import pytest
import torch
from conftest import VOCABULARY

from darwinlm.adapters.cutting import build_model
from darwinlm.data import Corpus
from darwinlm.learning_rate import LearningRate
from darwinlm.recipe import SearchRecipe
from darwinlm.scoring import DenseReference
from darwinlm.training import train_briefly

RECIPE = SearchRecipe(
    descent_rounds=0,
    generations=2,
    offspring=4,
    survivors=(2, 1),
    trial_tokens=(24, 48),
    score_tokens=(48, 96),
    trial_loss="distillation",
)


def text(seed, blocks=8):
    return torch.randint(0, VOCABULARY, (blocks, 24), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


CORPUS = Corpus({"trial": text(1), "score": text(2)})


def rescaled(weights):
    """The same function of other weights, to the last bit: all factors are powers of two, and none meets a bias."""
    found = {}
    for name, tensor in weights.items():
        module = name.removesuffix(".weight").rsplit(".", 1)[-1]
        scale = {
            "input_layernorm": 8,
            "post_attention_layernorm": 8,
            **dict.fromkeys(("q_proj", "k_proj", "gate_proj"), 1 / 8),
            "v_proj": 1 / 2,
            "o_proj": 1 / 4,
            "up_proj": 1 / 4,
            "down_proj": 1 / 2,
        }
        factor = scale.get(module, 1) if name.endswith(".weight") else {"v_proj": 4, "up_proj": 2}.get(
            name.removesuffix(".bias").rsplit(".", 1)[-1], 1
        )  # fmt: skip
        found[name] = tensor * factor
    return found


@pytest.mark.parametrize("loss", ["next-token", "distillation"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_trial_gains_does_not_depend_on_how_weights_are_scaled(family, loss, pruned):
    dense, database = pruned(family, "kv_group")
    levels = [1 + i % 2 for i in range(len(dense.sites))]
    cuts = database.cuts(dense.sites, levels, dense.device)
    cut = build_model(dense.config, dense.sites, dense.weights, cuts).state_dict()
    blocks_BT, judge = text(3, 4), DenseReference(dense.model, text(4))
    aims_BTD = DenseReference(dense.model, blocks_BT).expected_rows() if loss == "distillation" else None

    def gains(rate):
        kls = []
        for weights in (cut, rescaled(cut)):
            model = build_model(dense.config, dense.sites, dense.weights, cuts, trainable=True)
            model.load_state_dict(weights)
            before = judge.compare(model).kl
            assert train_briefly(model, blocks_BT, rate=rate, batch_size=1, aims_BTD=aims_BTD)
            kls.append(before - judge.compare(model).kl)
        return kls

    own, other = gains(LearningRate(2.0**-6, relative=True))
    assert abs(own) > 1e-4
    assert other == pytest.approx(own, rel=1e-3)
