"""Tests of large models on an accelerator: dense weights in their own dtype, layers offloaded during trials.

The CPU simulates the accelerator: the dense model is held in bfloat16, as on a GPU.
"""

import dataclasses
import json

import pytest
import torch
from helpers import SETTINGS, TARGET, VOCABULARY

from darwinlm.config.recipe import SearchRecipe
from darwinlm.data.corpus import Corpus
from darwinlm.data.tokens import Tokens
from darwinlm.models.loading import DenseModel
from darwinlm.pipeline import prune
from darwinlm.plan import parameter_budget
from darwinlm.search import sensitivity, trials
from darwinlm.search.allocation import error_plan
from darwinlm.search.descent import Sensitivity
from darwinlm.search.sensitivity import measure_sensitivity
from darwinlm.search.trials import TrialScorer

BLOCKS = torch.randint(0, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
CORPUS = Corpus(dict.fromkeys(("train", "validation"), Tokens.unmasked(BLOCKS)))


@pytest.fixture
def half(pruned, monkeypatch):
    """Model with weights in bfloat16, and its database."""
    monkeypatch.setattr(DenseModel, "compute_dtype", property(lambda dense: torch.bfloat16))
    dense, database = pruned("llama", "kv_group")
    return dataclasses.replace(dense), database


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_run_with_bfloat16_dense_model(family, checkpoint, text, monkeypatch, tmp_path):
    settings = SETTINGS | {"data.source": str(text), "search.descent_rounds": 1, "recovery.refit_tokens": 64}
    rows = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(DenseModel, "compute_dtype", property(lambda dense, dtype=dtype: dtype))
        run = prune(checkpoint(family), target=TARGET, out=tmp_path / str(dtype), settings=settings)
        rows[dtype] = {row["name"]: row for row in run.metrics["rows"]}
        assert json.loads((run.model_path / "config.json").read_text())["dtype"] == "float32"
    for name in ("uniform", "recovered"):
        full, half = (rows[dtype][name] for dtype in rows)
        assert full["parameters"] == pytest.approx(half["parameters"], rel=0.01)
        assert half["kl"] == pytest.approx(full["kl"], rel=0.25)


def test_dense_model_stays_in_bfloat16(half):
    dense, database = half
    space = database.space(dense.sites)
    plan = error_plan(space, parameter_budget(TARGET, space))
    scorer = TrialScorer(dense, database, CORPUS, SearchRecipe(learning_rate=1e-4))
    before = {name: tensor.clone() for name, tensor in dense.weights.items()}
    assert scorer.score_after(plan, 24, 24).kl > 0
    assert {tensor.dtype for tensor in dense.weights.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.weights.items())


def test_layers_offloaded_when_trial_does_not_fit(pruned, monkeypatch):
    dense, database = pruned("qwen2", "kv_group")
    space = database.space(dense.sites)
    plan = error_plan(space, parameter_budget(TARGET, space))
    parked = []
    monkeypatch.setattr(DenseModel, "offload_layers", lambda model: parked.append(model))
    trained = space.parameters(plan.levels) - space.fixed_parameters
    for free, expected in ((18 * trained, []), (18 * trained - 1, [dense])):
        monkeypatch.setattr(trials, "free_memory", lambda device, free=free: free)
        scorer = TrialScorer(dense, database, CORPUS, SearchRecipe(learning_rate=1e-4))
        scorer.score_after(plan, 24, 24)
        assert parked == expected


def test_sensitivities_in_bfloat16(half, monkeypatch):
    dense, database = half
    space = database.space(dense.sites)
    base = error_plan(space, parameter_budget(TARGET, space))

    def costs(dtype, free) -> Sensitivity:
        monkeypatch.setattr(sensitivity, "fast_dtype", lambda device: dtype)
        monkeypatch.setattr(sensitivity, "free_memory", lambda device: free)
        found = measure_sensitivity(
            dense,
            lambda index, level: database.cut(dense.sites[index], level, dense.device),
            space,
            base,
            BLOCKS,
            seed=0,
        )
        return torch.tensor([value for row in found.first for value in row])

    full, low = costs(torch.float32, 1 << 40), costs(torch.bfloat16, 0)
    assert torch.nn.functional.cosine_similarity(full, low, dim=0) > 0.99
