"""Tests of trials: gains independent of the scale of weights, the search for a learning rate, reports."""

import json
import statistics

import pytest
import torch
from helpers import VOCABULARY, rescaled

from darwinlm.config.loading import load_recipe
from darwinlm.config.recipe import SearchRecipe
from darwinlm.data.corpus import Corpus
from darwinlm.data.tokens import Tokens
from darwinlm.errors import UserError
from darwinlm.metrics.kl import DenseReference
from darwinlm.models.cutting import build_model
from darwinlm.optim.learning_rate import LearningRate, parameter_groups
from darwinlm.plan import parameter_budget
from darwinlm.runtime.files import read_json, write_json
from darwinlm.search import stage, trial_training, trials
from darwinlm.search.allocation import error_plan, uniform_plan
from darwinlm.search.evolution import Evolution, Score
from darwinlm.search.stage import search_plan
from darwinlm.search.trial_training import train_briefly
from darwinlm.search.trials import TrialScorer, best_rate

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


CORPUS = Corpus({"train": Tokens.unmasked(text(1)), "validation": Tokens.unmasked(text(2))})


@pytest.mark.parametrize("optimizer", ["adamw", "sign"])
@pytest.mark.parametrize("loss", ["next-token", "distillation"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_trial_gain_independent_of_weight_scale(family, loss, optimizer, pruned, monkeypatch):
    if optimizer == "sign":  # stochastic rounding differs for other weights
        monkeypatch.setattr(trial_training, "fast_dtype", lambda device: torch.float32)
    dense, database = pruned(family, "kv_group")
    levels = [1 + i % 2 for i in range(len(dense.sites))]
    cuts = database.cuts(dense.sites, levels, dense.device)
    cut = build_model(dense.config, dense.sites, dense.weights, cuts).state_dict()
    blocks_BT, judge = text(3, 4), DenseReference(dense.model, text(4))
    target_rows_BTD = DenseReference(dense.model, blocks_BT).mean_head_rows() if loss == "distillation" else None

    def gains(rate):
        kls = []
        for weights in (cut, rescaled(cut)):
            model = build_model(dense.config, dense.sites, dense.weights, cuts, trainable=True)
            model.load_state_dict(weights)
            before = judge.compare(model).kl
            settings = {"optimizer": optimizer, "rate": rate, "batch_size": 1, "target_rows_BTD": target_rows_BTD}
            assert train_briefly(model, blocks_BT, **settings)
            kls.append(before - judge.compare(model).kl)
        return kls

    own, other = gains(LearningRate(2.0**-6, relative=True))
    assert abs(own) > 1e-4
    assert other == pytest.approx(own, rel=1e-3)


def test_relative_step_of_every_tensor():
    tensors = [torch.nn.Parameter(torch.randn(5, 7) * scale) for scale in (1e-3, 1.0, 40.0)]
    zeros = torch.nn.Parameter(torch.zeros(3))
    before = [tensor.detach().clone() for tensor in tensors]
    optimizer = torch.optim.AdamW(parameter_groups([*tensors, zeros], LearningRate(0.01, relative=True)))
    for tensor in (*tensors, zeros):
        tensor.grad = torch.randn_like(tensor)
    tensors[1].grad[0] *= 1e-12
    optimizer.step()
    moved = [
        (tensor.detach() - old).abs() / old.square().mean().sqrt()
        for tensor, old in zip(tensors, before, strict=True)
    ]  # fmt: skip
    for share in (moved[0], moved[1][1:], moved[2]):
        assert share.numpy() == pytest.approx(0.01, rel=1e-2)
    assert moved[1][0].max() < 1e-4, "a negligible gradient gives a negligible step"
    assert not zeros.any(), "zero tensors have no relative step"


@pytest.mark.parametrize("together", [1, 30, 10**6])
@pytest.mark.parametrize("rate", [LearningRate(0.01), LearningRate(0.01, relative=True)])
def test_adam_matches_pytorch(rate, together, monkeypatch):
    monkeypatch.setattr(trial_training, "TOGETHER", together)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((5, 7), (3,), (4, 2), (6,))]
    start[1] *= 100
    start[2][:] = 0  # zero norm: it does not change at a relative rate
    ours, theirs = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    mine, other = trial_training.Adam(ours, rate), torch.optim.AdamW(parameter_groups(theirs, rate), weight_decay=0.0)
    for _ in range(5):
        for one, two in list(zip(ours, theirs, strict=True))[:3]:  # the last never gets a gradient
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        mine.step()
        other.step()
        assert all(one.grad is None for one in ours if one is not ours[2] or not rate.relative)
    for one, two, before in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
        assert torch.equal(one, before) == (before is start[3] or (rate.relative and before is start[2]))


def test_weight_decay_with_relative_rate():
    tensor = torch.nn.Parameter(torch.full((4,), 16.0))
    tensor.grad = torch.zeros(4)
    torch.optim.AdamW(parameter_groups([tensor], LearningRate(0.25, relative=True), weight_decay=0.5)).step()
    assert tensor.tolist() == pytest.approx([16 * (1 - 0.25 * 0.5)] * 4)


@pytest.mark.parametrize("best", [2.0**-16, 2.0**-11, 2.0**-8])
def test_best_rate_from_any_start(best):
    def score(rate):
        return Score(1 - rate / best + (rate / best) ** 2 / 2)

    rate, tried = best_rate(score, score(0.0), 2.0**-11)
    assert rate == best
    assert tried[rate].kl == min(one.kl for one in tried.values()) and len(tried) <= 9


@pytest.mark.parametrize("harm", [1.0, 1e9])
def test_best_rate_zero_when_harmful(harm):
    rate, tried = best_rate(lambda rate: Score(1 + harm * rate), Score(1.0), 2.0**-11)
    assert rate == 0 and len(tried) == 9


@pytest.mark.parametrize(("spread", "kept"), [(0.01, True), (1.0, False)])
def test_best_rate_ignores_gain_within_error(spread, kept):
    def score(rate):
        kls = [1.0, 2.0, 3.0, 4.0]
        if rate == 2.0**-11:
            kls = [kl - 0.1 + spread * (-1) ** number for number, kl in enumerate(kls)]
        return Score(statistics.fmean(kls) + (rate > 2.0**-11), by_block=tuple(kls))

    assert (best_rate(score, score(0.0), 2.0**-11)[0] > 0) is kept


@pytest.fixture
def scored(pruned):
    dense, database = pruned("qwen2", "kv_group")
    space = database.space(dense.sites)
    return dense, database, space, parameter_budget(0.7, space)


def test_rate_search_uses_unused_trial_text(scored, monkeypatch):
    dense, database, space, budget = scored
    scorer = TrialScorer(dense, database, CORPUS, RECIPE)
    judged = []

    class Spy(DenseReference):
        def __init__(self, model, blocks_BT):
            judged.append(blocks_BT)
            super().__init__(model, blocks_BT)

    monkeypatch.setattr(trials, "DenseReference", Spy)
    monkeypatch.setattr(scorer, "_target_rows", lambda blocks_BT: None)
    found = scorer.find_rates(error_plan(space, budget))
    assert [one["tokens"] for one in found] == [24, 48]
    (blocks_BT,) = judged
    assert torch.equal(blocks_BT, CORPUS.splits["train"].input_ids_BT[-4:])


def test_harmful_trial_skipped(scored, monkeypatch):
    dense, database, space, budget = scored
    plan = error_plan(space, budget)
    scorer = TrialScorer(dense, database, CORPUS, RECIPE)
    scorer.take_rates([{"tokens": 24, "rate": 0.0}, {"tokens": 48, "rate": 2.0**-8}])
    without, trained = scorer.score(plan, 0, plan), scorer.score(plan, 1, plan)
    assert without.untrained is None and trained.untrained is not None
    monkeypatch.setattr(trials, "train_briefly", lambda *arguments, **named: pytest.fail("trained"))
    assert scorer.score(plan, 0, plan) == without


@pytest.mark.parametrize(("rate", "advice"), [(0.9, r"set search.learning_rate=auto, or lower it"), (1e-9, None)])
def test_harmful_trials_reported(scored, rate, advice, tmp_path, caplog):
    dense, database, _, budget = scored
    recipe = RECIPE.model_copy(update={"learning_rate": rate, "trial_tokens": (0, 48)})
    with caplog.at_level("WARNING", logger="darwinlm"):
        search_plan(dense, database, CORPUS, budget, recipe, 0, tmp_path)
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    tried = [sum(entry["trials"][step]["tried"] for entry in history) for step in (0, 1)]
    helped = sum(entry["trials"][1]["helped"] for entry in history)
    assert tried == [0, 2 + 2 * 2]  # the starting plans, and the survivors of each generation
    said = [record.getMessage() for record in caplog.records]
    if advice is None:
        assert helped >= tried[1] / 2 or said
    else:
        assert helped == 0
        assert said == [f"search: trials of step 2 improved only 0 of 6 candidates; {advice} (in a new run)"]


def test_resumed_search_keeps_rates(scored, tmp_path, monkeypatch):
    dense, database, _, budget = scored
    whole = search_plan(dense, database, CORPUS, budget, RECIPE, 0, tmp_path / "whole")
    write = stage.write_json

    class StoppedError(Exception):
        pass

    def stop(file, *arguments, **named):
        write(file, *arguments, **named)
        if file.name == "state.json":
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_json", stop)
        with pytest.raises(StoppedError):
            search_plan(dense, database, CORPUS, budget, RECIPE, 0, tmp_path / "parts")
    monkeypatch.setattr(TrialScorer, "find_rates", lambda scorer, plan: pytest.fail("searched again"))
    assert search_plan(dense, database, CORPUS, budget, RECIPE, 0, tmp_path / "parts") == whole
    for name in ("trials.json", "history.jsonl", "state.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_forecast_trains_without_trials(scored, tmp_path):
    dense, database, _, budget = scored
    changes = {"trial_tokens": (0, 0), "forecast_candidates": 4, "generations": 1}
    search_plan(dense, database, CORPUS, budget, RECIPE.model_copy(update=changes), 0, tmp_path)
    forecast = json.loads((tmp_path / "forecast.json").read_text())
    assert len(forecast["scores"]) == 4
    assert not set(forecast["scores"]) & set(forecast["steps"][-1]["scores"]), "training changes the scores"


def test_state_of_other_version_error(scored, tmp_path):
    dense, database, _, budget = scored
    search_plan(dense, database, CORPUS, budget, RECIPE, 0, tmp_path)
    state = read_json(tmp_path / "state.json")
    state["scores"] = [[[levels, kl] for levels, kl, *_ in known] for known in state["scores"]]
    write_json(tmp_path / "state.json", state, sealed=True)
    with pytest.raises(
        UserError, match=r"state\.json was written by another version of darwinlm; delete .* to restart the search"
    ):
        search_plan(dense, database, CORPUS, budget, RECIPE, 0, tmp_path)


def test_trial_gain_of_generation(scored):
    _, _, space, budget = scored
    starts = [uniform_plan(space, budget), error_plan(space, budget)]
    search = Evolution(space, budget, RECIPE, starts, 0)
    old, new = (1.0, 2.0, 4.0, 3.0), (0.9, 2.1, 3.5, 2.5)
    search.tell([Score(statistics.fmean(kls), by_block=kls) for kls in (old, new)])
    gain = search.history[0]["gain"]
    pairs = torch.tensor(old, dtype=torch.float64) - torch.tensor(new, dtype=torch.float64)
    assert search.parent == starts[1]
    assert gain["mean"] == pytest.approx(pairs.mean().item())
    assert gain["error"] == pytest.approx((pairs.var() / 4).sqrt().item())


def test_rate_search_needs_own_text():
    settings = {"model": "m", "target": 0.5, "data.train_tokens": 1024}
    message = (
        r"search.learning_rate=auto needs training text beyond search.trial_tokens=\[512, 1024\]; raise data.train_"
    )
    with pytest.raises(UserError, match=message):
        load_recipe("quick", settings)
    assert load_recipe("quick", {**settings, "search.learning_rate": 1e-5}).search.learning_rate == 1e-5
