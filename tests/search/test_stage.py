"""Tests of the search with tensors: scores without trials, early stopping, and the same results on several ranks."""

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from helpers import VOCABULARY

from darwinlm.config.recipe import DatabaseRecipe, SearchRecipe
from darwinlm.data.corpus import Corpus, save_corpus
from darwinlm.data.tokens import Tokens
from darwinlm.database.build import build_database
from darwinlm.metrics.kl import DenseReference
from darwinlm.models.cutting import build_model
from darwinlm.models.loading import load_dense
from darwinlm.plan import Plan, parameter_budget
from darwinlm.runtime.files import read_json
from darwinlm.search import stage, trials
from darwinlm.search.allocation import error_plan, even_plans, uniform_plan
from darwinlm.search.evolution import Evolution, Score
from darwinlm.search.stage import search_plan
from darwinlm.search.trials import TrialScorer

RECIPE = SearchRecipe(
    descent_rounds=2,
    sensitivity_tokens=72,
    generations=2,
    offspring=4,
    survivors=(3, 2, 1),
    trial_tokens=(0, 24, 48),
    score_tokens=(48, 72, 96),
    learning_rate=1e-3,
)


def text(seed):
    return torch.randint(0, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


CORPUS = Corpus({"train": Tokens.unmasked(text(1)), "validation": Tokens.unmasked(text(2))})


@pytest.fixture(params=["mistral", "qwen2"])
def scored(request, pruned):
    dense, database = pruned(request.param, "query_head")
    space = database.space(dense.sites)
    return dense, database, space, parameter_budget(0.7, space)


def test_score_without_trial_matches_whole_model(scored, monkeypatch):
    monkeypatch.setattr(trials, "fast_dtype", lambda device: torch.float32)
    dense, database, space, budget = scored
    scorer = TrialScorer(dense, database, CORPUS, RECIPE)
    parent, plan = error_plan(space, budget), uniform_plan(space, budget)
    for one in (parent, plan, Plan(levels=(0,) * len(space.sites))):
        whole = build_model(
            dense.config, dense.sites, dense.weights, database.cuts(dense.sites, one.levels, dense.device)
        )
        expected = DenseReference(dense.model, CORPUS.splits["validation"].first(48).input_ids_BT).compare(whole).kl
        assert scorer.score(one, 0, parent).kl == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_search_drops_diverged_candidates(scored, monkeypatch, tmp_path):
    dense, database, _, budget = scored
    trained = []

    def explode(model, *args, **kwargs):
        trained.append(model)
        if len(trained) % 3 == 0:
            with torch.no_grad():
                next(model.model.layers.parameters()).fill_(torch.nan)
        return True

    monkeypatch.setattr(trials, "train_briefly", explode)
    plan = search_plan(dense, database, CORPUS, budget, RECIPE, 0, tmp_path)
    assert budget.holds(plan.levels)
    entries = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert any(None in entry["scores"] for entry in entries)
    for entry in entries:
        finite = [kl for kl in entry["scores"] if kl is not None]
        assert entry["scores"] == [*sorted(finite), *[None] * (len(entry["scores"]) - len(finite))]
        assert entry["score"] == min(finite)


def test_search_resumes_former_state_with_diverged_trials(scored):
    """The former version wrote 1e9 for diverged trials."""
    _, _, space, budget = scored
    starts = stage.starting_plans(space, budget)
    recipe = RECIPE.model_copy(update={"generations": 2})
    values = [0.5, None, 0.75, None, 0.25, 0.125]

    def run(former):
        search, count = Evolution(space, budget, recipe, starts, seed=0), 0
        while (request := search.ask()) is not None:
            scores = [Score(values[(count + n) % len(values)], untrained=0.6) for n in range(len(request.plans))]
            count += len(scores)
            search.tell(scores)
            state = json.loads(json.dumps(search.state(), allow_nan=False))
            if former:
                for row in itertools.chain(*state["scores"]):
                    row[1] = 1e9 if row[1] is None else row[1]
                for entry in state["history"]:
                    entry["scores"] = [1e9 if kl is None else kl for kl in entry["scores"]]
            search = Evolution.resume(space, budget, recipe, state)
        return search

    now, before = run(former=False), run(former=True)
    assert now.history == before.history and now.parent == before.parent
    assert any(None in entry["scores"] for entry in now.history)


def test_plans_without_finite_kl_ranked_last(scored, monkeypatch):
    dense, database, space, budget = scored
    plans = [uniform_plan(space, budget), error_plan(space, budget), Plan(levels=(1,) * len(space.sites))]
    comparison = stage._PlanComparison(dense, database, CORPUS.splits["validation"].input_ids_BT)
    expected = comparison.ranked([plans[0], plans[2]])[1]
    found = comparison._kls

    def kls(reference, plan):
        return [math.inf if plan == plans[1] else kl for kl in found(reference, plan)]

    monkeypatch.setattr(comparison, "_kls", kls)
    order, scores = comparison.ranked(plans)
    assert order[-1] == 1 and scores == [expected[0], None, expected[1]]
    assert comparison.ranked([plans[1]]) == ([0], [None])


def test_trial_loss_distillation(scored):
    dense, database, space, budget = scored
    plan, recipe = error_plan(space, budget), RECIPE.model_copy(update={"learning_rate": 1e-3})
    score = CORPUS.splits["validation"]
    corpus = Corpus({"train": score, "validation": score})  # scores on the training text reveal the loss
    whole = score.input_ids_BT.numel()
    untrained = TrialScorer(dense, database, corpus, recipe.model_copy(update={"trial_tokens": (0,) * 2}))
    kls = {"none": untrained.score(plan, 0, plan).kl}
    for loss in ("next-token", "distillation"):
        scorer = TrialScorer(dense, database, corpus, recipe.model_copy(update={"trial_loss": loss}))
        # The longer one first: teacher predictions are cached for shorter ones.
        kls[loss] = [scorer.score_after(plan, tokens, whole).kl for tokens in (whole, score.input_ids_BT.shape[1])]
        assert (
            kls[loss][1]
            == TrialScorer(dense, database, corpus, recipe.model_copy(update={"trial_loss": loss}))
            .score_after(plan, 24, whole)
            .kl
        )
    assert kls["distillation"][0] < kls["none"] and kls["distillation"][0] < kls["next-token"][0]


@pytest.mark.slow
def test_search_forecast_of_every_step(scored, tmp_path):
    dense, database, _, budget = scored
    recipe = RECIPE.model_copy(update={"forecast_candidates": 5, "descent_rounds": 0})
    found = search_plan(dense, database, CORPUS, budget, recipe, 0, tmp_path / "with")
    without = search_plan(
        dense, database, CORPUS, budget, RECIPE.model_copy(update={"descent_rounds": 0}), 0, tmp_path / "without"
    )
    assert found == without
    forecast = json.loads((tmp_path / "with" / "forecast.json").read_text())
    assert len(forecast["scores"]) == 5 and forecast["training_tokens"] == 8 * 24
    assert [step["step"] for step in forecast["steps"]] == [0, 1, 2]
    assert all(
        -1 <= step["low"] <= step["rho"] + 1e-5 and step["rho"] <= step["high"] + 1e-5 for step in forecast["steps"]
    )


def test_early_stopping_finds_best_plan(scored):
    dense, database, space, budget = scored
    plans = [uniform_plan(space, budget), error_plan(space, budget), Plan(levels=(1,) * len(space.sites))]
    hopeless = Plan(levels=tuple(len(site.units) - 1 for site in space.sites))
    reference = DenseReference(dense.model, CORPUS.splits["validation"].input_ids_BT)

    def whole(plan):
        cuts = database.cuts(dense.sites, plan.levels, dense.device)
        return reference.compare(build_model(dense.config, dense.sites, dense.weights, cuts)).kl

    best, found = stage._PlanComparison(dense, database, CORPUS.splits["validation"].input_ids_BT).best(
        [hopeless, *plans]
    )
    kls = [whole(plan) for plan in [hopeless, *plans]]
    assert kls[best] <= 1.02 * min(kls)
    assert found[best] == pytest.approx(kls[best], rel=0.02)


def test_early_stopping_on_easy_text(scored, monkeypatch):
    dense, database, _, _ = scored
    judge = stage._PlanComparison(dense, database, torch.zeros(16, 8, dtype=torch.long))
    harder = {id(heat): number for number, heat in enumerate(judge._references)}
    read = []

    def kls(heat, above):
        read.append((above, harder[id(heat)]))
        return [1 + 2 * harder[id(heat)] + above + 0.01 * block for block in range(4)]

    monkeypatch.setattr(judge, "_kls", kls)
    order, scores = judge.ranked([0.5, 0.0])
    assert (0.5, 0) in read and (0.5, 1) not in read
    assert order == [1, 0]
    assert scores[0] == pytest.approx(scores[1] + 0.5)


def test_uniform_search_trains_best_even_plans(scored, monkeypatch, tmp_path):
    dense, database, space, budget = scored
    plans = even_plans(space, parameter_budget(0.7, space))
    reference = DenseReference(dense.model, CORPUS.splits["validation"].input_ids_BT)
    kls = {}
    for plan in plans:
        cuts = database.cuts(dense.sites, plan.levels, dense.device)
        kls[plan] = reference.compare(build_model(dense.config, dense.sites, dense.weights, cuts)).kl
    trained = []
    score_after = TrialScorer.score_after

    def note(self, plan, trial_tokens, score_tokens):
        trained.append(plan)
        return score_after(self, plan, trial_tokens, score_tokens)

    monkeypatch.setattr(TrialScorer, "score_after", note)
    recipe = RECIPE.model_copy(update={"offspring": 3, "forecast_candidates": 4})
    found = search_plan(dense, database, CORPUS, budget, recipe, 0, tmp_path, uniform=True)
    assert read_json(tmp_path / "state.json")["generations"] == 0 < recipe.generations
    assert not (tmp_path / "descent.json").exists() and not (tmp_path / "forecast.json").exists()
    assert len(plans) > 3 == len(trained) and found in trained
    assert max(kls[plan] for plan in trained) <= 1.02 * sorted(kls.values())[2] < max(kls.values())


def test_early_stopping_uses_paired_difference():
    assert stage._beaten([2.0, 3.1, 4.0, 2.6], [1.0, 2.0, 3.1, 1.5])
    assert not stage._beaten([2.0, 3.0, 4.0, 2.6], [1.0, 4.0, 3.0, 3.5])
    assert not stage._beaten([9.0, 9.0], [1.0, 1.0]), "two blocks are not enough"


RANKS = """
import sys
from pathlib import Path
import torch
from darwinlm.runtime import dist
from darwinlm.models.loading import load_dense
from darwinlm.data.corpus import load_corpus
from darwinlm.database.store import Database
from darwinlm.plan import parameter_budget
from darwinlm.config.recipe import SearchRecipe
from darwinlm.search.stage import search_plan
dist.start()
root = Path(sys.argv[2])
dense = load_dense(sys.argv[1], "kv_group", torch.device("cpu"))
database = Database(root / "database")
budget = parameter_budget(0.7, database.space(dense.sites))
recipe = SearchRecipe.model_validate_json((root / "recipe.json").read_text())
corpus = load_corpus(root / "corpus.safetensors")
search_plan(dense, database, corpus, budget, recipe, 0, root / str(dist.world_size()))
dist.stop()
"""


@pytest.mark.slow
def test_three_ranks_write_same_files(checkpoint, calibration, tmp_path):
    folder = checkpoint("llama")
    dense = load_dense(str(folder), "kv_group", torch.device("cpu"))
    database = build_database(dense, calibration, DatabaseRecipe(levels=4), tmp_path / "database")
    search_plan(dense, database, CORPUS, parameter_budget(0.7, database.space(dense.sites)), RECIPE, 0, tmp_path / "1")
    save_corpus(CORPUS, tmp_path / "corpus.safetensors")
    (tmp_path / "recipe.json").write_text(RECIPE.model_dump_json())
    (tmp_path / "ranks.py").write_text(RANKS)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", str(tmp_path / "ranks.py")),
            *(str(folder), str(tmp_path)),
        ],
        env={**os.environ, "MASTER_ADDR": "localhost"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for file in ("descent.json", "state.json", "history.jsonl", "best_plan.json"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "3" / file).read_bytes()
