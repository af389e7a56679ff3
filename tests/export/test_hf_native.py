"""Tests of uniform layers: found by the search, and saved as a transformers model without code in the folder."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from helpers import FAMILIES, SETTINGS, make_checkpoint, make_config, save_pruned
from shapes import BOTH, MLP
from transformers import AutoModelForCausalLM

from darwinlm import UserError
from darwinlm.cli import exit_code
from darwinlm.config.loading import make_recipe
from darwinlm.config.recipe import DatabaseRecipe
from darwinlm.database.build import build_database
from darwinlm.database.store import Database
from darwinlm.export.targets import export_model
from darwinlm.models.loading import load_dense
from darwinlm.models.sites import sites_needed
from darwinlm.pipeline import prune
from darwinlm.plan import parameter_budget
from darwinlm.search.allocation import even_plans

SMALL = {"num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 40}
INDIVISIBLE = {"num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 40}
TOKENS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(6))
UNBIASED = {"attention_bias": False, "mlp_bias": False}


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize(
    ("family", "settings", "sizes", "kind"),
    [
        *[(family, {}, SMALL, family) for family in FAMILIES],
        *[(family, {}, INDIVISIBLE, family) for family in FAMILIES if family != "llama"],
        ("llama", UNBIASED, INDIVISIBLE, "mistral"),
        ("llama", {"tie_word_embeddings": True, "mlp_bias": False}, SMALL, "llama"),
        ("mistral", {"sliding_window": None}, SMALL, "mistral"),
        ("qwen3", {"tie_word_embeddings": False}, SMALL, "qwen3"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, SMALL, "qwen2"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, SMALL, "llama"),
    ],
)
@pytest.mark.parametrize("dropped", [None, 0, 1, 2])
def test_native_folder_loads_in_transformers(family, settings, sizes, kind, dropped, tmp_path):
    config = make_config(family, **settings)
    config.per_layer_config = {layer: BOTH if layer == dropped else sizes for layer in range(3)}
    model = save_pruned(config, tmp_path / "model")
    exported = export_model(tmp_path, "hf-native")
    native = AutoModelForCausalLM.from_pretrained(exported.path)
    assert native.config.model_type == kind
    assert native.config.num_hidden_layers == (3 if dropped is None else 2)
    assert torch.allclose(logits(native), logits(model), atol=1e-4)
    assert sum(p.numel() for p in native.parameters()) == sum(p.numel() for p in model.parameters())
    assert exported.proof.difference < 1e-5
    assert not list(exported.path.glob("*.py"))
    assert "auto_map" not in json.loads((exported.path / "config.json").read_text())


def test_native_export_of_dense_model(tmp_path, checkpoint, pruned):
    dense, _ = pruned("qwen3", "kv_group")
    save_pruned(dense.config, tmp_path / "model")
    dense.model.save_pretrained(tmp_path / "model")
    native = AutoModelForCausalLM.from_pretrained(export_model(tmp_path, "hf-native").path)
    original = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3"))
    assert torch.equal(logits(native), logits(original))


@pytest.mark.parametrize(
    ("settings", "shape", "match"),
    [
        (
            {},
            {1: SMALL},
            "layers differ in size.*layer 0: 6 query and 2 KV heads, 64 MLP channels; layer 1: 3",
        ),
        ({}, {0: MLP, 1: MLP, 2: MLP}, "or a part is missing .layer 0: 6 query and 2 KV heads, 0 MLP channels"),
        ({}, dict.fromkeys(range(3), INDIVISIBLE), r"5 heads do not divide the hidden size 48.*no biases .qkv_bias"),
        (
            {},
            {layer: SMALL | {"num_key_value_heads": 2, "query_heads_per_kv_head": [1, 2]} for layer in range(3)},
            "serve 1 and 2 query heads",
        ),
    ],
)
def test_native_export_refused(settings, shape, match, tmp_path):
    config = make_config("llama", **settings)
    config.per_layer_config = shape
    save_pruned(config, tmp_path / "model")
    with pytest.raises(UserError, match=match):
        export_model(tmp_path, "hf-native")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_linear_attention_layer_keeps_mlp(calibration, tmp_path):
    """Linear attention and its MLP are kept, as transformers needs them; a layer with full attention may be removed."""
    kinds = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    folder = make_checkpoint("qwen3_5_text", tmp_path / "dense", num_hidden_layers=4, layer_types=kinds)
    dense = load_dense(str(folder), "kv_group", torch.device("cpu"))
    build_database(dense, calibration, DatabaseRecipe(levels=4), tmp_path / "database")
    database = Database(tmp_path / "database", kept=sites_needed(dense.config, dense.sites))
    space = database.space(dense.sites)
    plans = even_plans(space, parameter_budget(0.75, space))
    gone = {
        site.layer
        for plan in plans
        for site, level in zip(space.sites, plan.levels, strict=True)
        if site.units[level] == 0
    }
    assert gone == {3}
    for plan in plans:
        cut = {(site.kind, site.units[level]) for site, level in zip(space.sites, plan.levels, strict=True)}
        assert len([one for one in cut if one[1]]) == 2


@pytest.mark.parametrize("target", [0.95, 0.8, 0.7, 0.5])
def test_even_plans_are_largest(pruned, target):
    dense, database = pruned("qwen2", "kv_group")
    space = database.space(dense.sites)
    budget = parameter_budget(target, space)
    last = [len(site.units) - 1 for site in space.sites]
    errors = [space.sites[2 * layer].errors[-1] + space.sites[2 * layer + 1].errors[-1] for layer in range(3)]
    expected = []
    for removed in range(3):
        gone = sorted(range(3), key=errors.__getitem__)[:removed]

        def levels(attention, mlp, gone=gone):
            pairs = [last[2 * n : 2 * n + 2] if n in gone else [attention, mlp] for n in range(3)]
            return tuple(level for pair in pairs for level in pair)

        pairs = itertools.product(range(last[0]), range(last[1]))
        fitting = {pair for pair in pairs if space.parameters(levels(*pair)) <= budget.limits[0].maximum}
        expected += [
            levels(*one)
            for one in sorted(fitting)
            if not any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in fitting)
        ]
        if (0, 0) in fitting:
            break
    assert [plan.levels for plan in even_plans(space, budget)] == expected != []
    tight = replace(budget.limits[0], maximum=space.fixed_parameters + 1)
    assert even_plans(space, replace(budget, limits=(tight,))) == []


def test_even_plans_remove_layers_by_error(pruned):
    dense, database = pruned("qwen2", "kv_group")
    budget = parameter_budget(0.7, database.space(dense.sites))

    def removed(kept):
        space = Database(database.folder, kept=kept).space(dense.sites)
        units = [
            [site.units[level] for site, level in zip(space.sites, p.levels, strict=True)]
            for p in even_plans(space, budget)
        ]
        return {tuple(n for n in range(3) if not any(one[2 * n : 2 * n + 2])) for one in units}

    space = database.space(dense.sites)
    cheapest = min(range(3), key=lambda n: space.sites[2 * n].errors[-1] + space.sites[2 * n + 1].errors[-1])
    assert (cheapest,) in removed(())
    without = removed({f"layers.{cheapest}.attention"})
    assert without and not any(cheapest in gone for gone in without)
    assert removed({site.name for site in dense.sites}) <= {()}


@pytest.mark.slow
def test_uniform_run_exports_native_folder(checkpoint, text, tmp_path, capsys):
    settings = SETTINGS | {"data.source": str(text), "search.uniform": True}
    run = prune(checkpoint("qwen2"), target=0.8, out=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run" / "search" / "descent.json").exists()
    history = [json.loads(line) for line in (tmp_path / "run" / "search" / "history.jsonl").read_text().splitlines()]
    assert len(history) == 1 and history[0]["score"] == min(history[0]["scores"])
    assert 1 < len(history[0]["scores"]) <= SETTINGS["search.offspring"]
    # The search has no mutations.
    assert "mutations of the evolution" not in (tmp_path / "run" / "report" / "index.html").read_text()
    found = run.metrics["rows"][-1]["parameters"]
    assert 0.6 < found / run.metrics["rows"][0]["parameters"] <= 0.8

    assert exit_code(["export", str(tmp_path / "run"), "--to", "hf-native", "--out", str(tmp_path / "native")]) == 0
    assert "verified: largest logit difference" in capsys.readouterr().out
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert sum(p.numel() for p in native.parameters()) == found
    assert torch.allclose(logits(native), logits(run.load()), atol=1e-4)
    card = (tmp_path / "native" / "README.md").read_text()
    before = (tmp_path / "run" / "model" / "README.md").read_text()
    for only_before in ("trust_remote_code", "modeling_darwinlm", "per_layer_config"):
        assert only_before in before and only_before not in card
    assert "## Measured" in card and "uniform: true" in card


def test_uniform_needs_kv_group_granularity():
    given = {"model": "m", "target": 0.5, "search": {"uniform": True}}
    assert make_recipe(given).search.uniform
    with pytest.raises(UserError, match=r"search.uniform=true with database.granularity=query_head"):
        make_recipe(given | {"database": {"granularity": "query_head"}})
    with pytest.raises(UserError, match=r"search.uniform = 3: must be auto, true or false"):
        make_recipe(given | {"search": {"uniform": 3}})
