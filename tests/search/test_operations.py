"""Tests of upper bounds on launches and waits of an accelerator, without one: they detect increases."""

import functools

import pytest
import torch
from helpers import VOCABULARY, make_checkpoint
from operations import Operations, as_on_gpu

from darwinlm.config.recipe import DatabaseRecipe, SearchRecipe
from darwinlm.data.corpus import Corpus
from darwinlm.data.tokens import Tokens
from darwinlm.database.build import build_database
from darwinlm.models.cutting import build_model
from darwinlm.models.loading import load_dense
from darwinlm.plan import Plan
from darwinlm.recovery.objective import Objective
from darwinlm.search.trials import TrialScorer

CPU = torch.device("cpu")
BLOCKS = torch.randint(0, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
CORPUS = Corpus(dict.fromkeys(("train", "validation"), Tokens.unmasked(BLOCKS)))


def candidate(folder, family, layers, rate):
    """Count launches and waits of one candidate, whose sites all differ from its parent's."""
    # Four groups of KV heads, so that levels 1 and 2 keep some of them.
    sizes = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4}
    checkpoint = make_checkpoint(family, folder / "dense", **sizes, attention_bias=False, mlp_bias=False)
    dense = load_dense(str(checkpoint), "kv_group", CPU)
    database = build_database(dense, BLOCKS, DatabaseRecipe(levels=5), folder / "database")
    assert all(site.units[2] > 0 for site in database.space(dense.sites).sites)
    database.cut = functools.cache(database.cut)  # on an accelerator, cuts are kept on the device
    recipe = SearchRecipe(trial_tokens=(24,), score_tokens=(48,), survivors=(1,), learning_rate=rate)
    scorer = TrialScorer(dense, database, CORPUS, recipe)
    parent, first, second = (Plan(levels=(level,) * len(dense.sites)) for level in (0, 1, 2))
    for plan in (second, first):
        scorer.score(plan, 0, parent)
    scorer = TrialScorer(dense, database, CORPUS, recipe)
    scorer.score(first, 0, parent)
    with Operations() as operations:
        scorer.score(second, 0, parent)
    return operations


@pytest.mark.parametrize("rate", [1e-3, "auto"])
def test_operations_of_candidate(rate, tmp_path, monkeypatch):
    """All sites are cut; the candidate is trained for a step, and scored before and after it."""
    as_on_gpu(monkeypatch)
    two, four = (candidate(tmp_path / str(layers), "llama", layers, rate) for layers in (2, 4))
    assert four.launches - two.launches <= 2 * 147, four.counts
    assert two.launches <= 475, two.counts
    assert two.waits == four.waits <= 4, four.counts


def test_operations_of_recovery_step(tmp_path, monkeypatch):
    as_on_gpu(monkeypatch)
    found = []
    for layers in (2, 4):
        folder = make_checkpoint("llama", tmp_path / str(layers), num_hidden_layers=layers)
        dense = load_dense(str(folder), "kv_group", CPU)
        model = build_model(dense.config, dense.sites, dense.weights, {}, trainable=True)
        objective = Objective(model.train(), dense.model, 1.0)
        with Operations() as operations:
            objective(BLOCKS.long(), BLOCKS.long())["loss"].backward()
        found.append(operations)
    two, four = found
    assert four.launches - two.launches <= 2 * 98, four.counts
    assert two.launches <= 300, two.counts
    assert two.waits == four.waits <= 4, four.counts
