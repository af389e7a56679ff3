"""Tests of layers streamed through the device one at a time: same numbers, and never two layers at once."""

import copy
import gc
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import SETTINGS, VOCABULARY, make_checkpoint
from rich.console import Console
from safetensors.torch import load_file

from darwinlm import UserError
from darwinlm.config.recipe import DatabaseRecipe, SearchRecipe
from darwinlm.data.corpus import Corpus
from darwinlm.data.tokens import Tokens
from darwinlm.database.build import build_database
from darwinlm.database.store import Database
from darwinlm.metrics.kl import DenseReference
from darwinlm.models import streaming
from darwinlm.models.device_memory import Portion
from darwinlm.models.loading import load_dense
from darwinlm.models.sites import sites_needed
from darwinlm.optim.learning_rate import LearningRate
from darwinlm.pipeline import prune
from darwinlm.plan import Plan, parameter_budget
from darwinlm.report.summary import show
from darwinlm.search import sensitivity, trial_training
from darwinlm.search.neighbourhood import Neighbourhood
from darwinlm.search.sensitivity import measure_sensitivity
from darwinlm.search.stage import search_plan
from darwinlm.search.trial_training import train_briefly

CPU = torch.device("cpu")
FAMILIES = ["qwen3", "gemma2", "qwen3_5_text", "qwen2_moe"]


def blocks_of(seed, blocks=8):
    return torch.randint(0, VOCABULARY, (blocks, 24), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


CORPUS = Corpus({"train": Tokens.unmasked(blocks_of(1)), "validation": Tokens.unmasked(blocks_of(2))})


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return a function that gives a model on its device, the same with streamed layers, and their database."""
    known = {}

    def get(family):
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            dense = load_dense(str(make_checkpoint(family, folder / "dense")), "kv_group", CPU)
            build_database(dense, blocks_of(0), DatabaseRecipe(levels=4, batch_size=4), folder / "database")
            database = Database(folder / "database", kept=sites_needed(dense.config, dense.sites))
            known[family] = dense, replace(dense, offload=True), database
        return known[family]

    return get


def middle(database, dense):
    return Plan(levels=tuple(len(site.units) // 2 for site in database.space(dense.sites).sites))


@pytest.fixture
def copies(monkeypatch):
    """Maximum number of layers on the device at once."""
    alive, most = weakref.WeakSet(), [0]
    own = streaming._Streamed.copies

    def counted(streamed):
        found = own(streamed)
        alive.update(list(found.values())[:1])  # none if the layer has no parts
        most[0] = max(most[0], len(alive))
        return found

    monkeypatch.setattr(streaming._Streamed, "copies", counted)
    return most


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_predictions(family, both, copies):
    dense, streamed, database = both(family)
    plan = middle(database, dense)
    reference = DenseReference(dense.model, blocks_of(2))
    again = DenseReference(streamed.model, blocks_of(2))
    torch.testing.assert_close(again._hidden_BTD, reference._hidden_BTD, rtol=0, atol=0)
    models = [one.cut(database.cuts(dense.sites, plan.levels, CPU)) for one in (dense, streamed)]
    assert streaming.is_streamed(models[1]) and not streaming.is_streamed(models[0])
    assert reference.compare(models[0]).kl == again.compare(models[1]).kl
    near = [
        Neighbourhood(one, reference, lambda i, level: database.cut(dense.sites[i], level, CPU), plan)
        for one in (dense, streamed)
    ]
    other = [0, *plan.levels[1:]]
    assert near[0].compare(other).kl == near[1].compare(other).kl
    assert copies[0] == 1


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_trial(family, batch, both, copies, monkeypatch):
    monkeypatch.setattr(trial_training, "fast_dtype", lambda device: torch.float32)
    dense, streamed, database = both(family)
    cuts = database.cuts(dense.sites, middle(database, dense).levels, CPU)
    settings = {"optimizer": "sign", "rate": LearningRate(2.0**-8, relative=True), "batch_size": batch}
    models = [one.cut(cuts, trainable=True, shared_ends=True) for one in (dense, streamed)]
    start = {name: tensor.detach().clone() for name, tensor in models[0].named_parameters()}
    for model in models:
        assert train_briefly(model, blocks_of(1)[:4], **settings, portion=Portion(2, "search"))
    assert copies[0] == 1
    moved = 0
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)
        moved += int(not torch.equal(one, start[name]))
    assert moved > 10
    assert all(tensor.grad is None for tensor in models[1].parameters())
    assert all(
        torch.equal(tensor, again)
        for tensor, again in zip(dense.weights.values(), streamed.weights.values(), strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_sensitivities(family, both, copies, monkeypatch):
    monkeypatch.setattr(sensitivity, "fast_dtype", lambda device: torch.float32)
    dense, streamed, database = both(family)

    def found(one):
        return measure_sensitivity(
            one, lambda i, level: database.cut(dense.sites[i], level, CPU), database.space(dense.sites),
            middle(database, dense), blocks_of(1)[:2], seed=0,
        )  # fmt: skip

    expected, got = found(dense), found(streamed)
    for one, other in ((expected.first, got.first), (expected.second, got.second)):
        for row, again in zip(one, other, strict=True):
            assert again == pytest.approx(row, rel=1e-4, abs=1e-7)
    assert any(abs(one) > 1e-4 for row in got.first for one in row)
    assert copies[0] == 1


def test_streamed_search_finds_same_plan(both, copies, tmp_path):
    dense, streamed, database = both("qwen3")
    budget = parameter_budget(0.7, database.space(dense.sites))
    recipe = SearchRecipe(
        descent_rounds=1,
        sensitivity_tokens=48,
        generations=2,
        offspring=3,
        trial_tokens=(24, 48),
        score_tokens=(48, 96),
    )
    plans = [
        search_plan(one, database, CORPUS, budget, recipe, 0, tmp_path / name)
        for name, one in (("whole", dense), ("streamed", streamed))
    ]
    assert plans[0] == plans[1]
    assert copies[0] == 1


@pytest.mark.slow
def test_streamed_run_gives_same_model(both, text, tmp_path):
    dense, _, _ = both("gemma2")
    settings = {**SETTINGS, "data.source": str(text), "recovery.refit_tokens": 64}
    runs = [
        prune(dense.source, target=0.8, out=tmp_path / place, settings=settings | {"search.offload": place})
        for place in ("device", "cpu")
    ]
    whole, streamed = (load_file(run.path / "model" / "model.safetensors") for run in runs)
    assert whole.keys() == streamed.keys() and all(torch.equal(whole[name], streamed[name]) for name in whole)
    for one, other in zip(*(run.metrics["rows"] for run in runs), strict=True):
        assert other["kl"] == pytest.approx(one["kl"], rel=1e-5) and other["perplexity"] == one["perplexity"]
        assert one["decode_tokens_per_second"] > 0 and other["decode_tokens_per_second"] is None
    page = (runs[1].path / "report" / "index.html").read_text()
    assert "Not measured: the layers were in CPU" in page
    assert "| not measured | not measured |" in (runs[1].path / "model" / "README.md").read_text()
    show(runs[1].metrics, Console())


def test_streaming_invalid_settings_refused(both, text, tmp_path):
    dense, _, _ = both("qwen3")
    settings = {**SETTINGS, "data.source": str(text), "search.offload": "cpu"}
    with pytest.raises(UserError, match=r"search\.offload=cpu needs search\.trial_optimizer=sign"):
        prune(dense.source, target=0.8, out=tmp_path / "a", settings=settings | {"search.learning_rate": 1e-4})
    with pytest.raises(UserError, match=r"latency target needs the model's layers on the device"):
        prune(dense.source, target="latency=0.8", out=tmp_path / "b", settings=settings)


def test_streaming_with_load_balancing_refused(text, tmp_path):
    """Routers run where layers are recomputed for their gradients, not where the loss is computed."""
    folder = make_checkpoint("mixtral", tmp_path / "dense", output_router_logits=True)
    settings = {**SETTINGS, "data.source": str(text), "search.offload": "cpu"}
    with pytest.raises(UserError, match=r"cannot add the load-balancing loss .* output_router_logits to false"):
        prune(folder, target=0.8, out=tmp_path / "run", settings=settings)


def test_streamed_candidate_is_freed(both):
    _, streamed, database = both("qwen3")
    cuts = database.cuts(streamed.sites, middle(database, streamed).levels, CPU)
    model = streamed.cut(cuts, trainable=True, shared_ends=True)
    gc.disable()
    try:
        assert train_briefly(model, blocks_of(1)[:1], optimizer="sign", rate=LearningRate(1e-3), batch_size=1)
        left = weakref.ref(model.model.layers[1].mlp.up_proj.weight)
        del model
        assert left() is None
    finally:
        gc.enable()


def test_streamed_layers_are_memory_mapped(tmp_path):
    """Layers are mapped in the checkpoint's dtype, though computed in another; the ends are copies."""
    dense = load_dense(str(make_checkpoint("qwen3", tmp_path, torch.bfloat16)), "kv_group", CPU)
    streamed = replace(dense, offload=True)
    expected, found = (one.model(blocks_of(0).long()).logits for one in (dense, streamed))
    assert found.dtype == torch.float32 and torch.equal(expected, found)
    for name, tensor in streamed.weights.items():
        in_layers = name.startswith("model.layers.")
        assert tensor.dtype == (torch.bfloat16 if in_layers else torch.float32), name
        if sys.platform == "linux":
            assert mapped_file(tensor).endswith(".safetensors") == in_layers, name


def mapped_file(tensor):
    """Return the file that a tensor is mapped from; empty for heap memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return " ".join(line.split()[5:])
    raise AssertionError("no mapping holds it")


def test_copied_streamed_layer_is_independent(both):
    """Copy a layer as refit does: in another dtype, without sharing the weights of the original."""
    _, streamed, _ = both("qwen3")
    layer = streamed.model.model.layers[0]
    copied = copy.deepcopy(layer).double()
    assert copied.forward.layer is copied and layer.forward.layer is layer
    assert {one.dtype for one in copied.forward.copies().values()} == {torch.float64}


def test_streaming_with_adamw_refused(both):
    _, streamed, _ = both("qwen3")
    model = streamed.cut({}, trainable=True)
    with pytest.raises(ValueError, match="sign"):
        train_briefly(model, blocks_of(1)[:1], rate=LearningRate(1e-3), batch_size=1)
