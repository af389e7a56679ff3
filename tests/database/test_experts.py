"""Tests of experts as units: the pruned layer equals the dense layer with a masked router."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from helpers import SETTINGS, VOCABULARY, make_checkpoint, make_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from darwinlm import UserError
from darwinlm.commands.inspect import inspect
from darwinlm.config.recipe import DatabaseRecipe, WorkloadRecipe
from darwinlm.database.build import build_database
from darwinlm.database.experts import Routed, prune_experts, refit_experts, removal_order
from darwinlm.database.grams import ExpertStatistics, walk_blocks
from darwinlm.database.levels import level_sizes
from darwinlm.database.store import Database
from darwinlm.export.targets import export_model
from darwinlm.metrics.kl import DenseReference
from darwinlm.models.cutting import Cut, build_model, cut_site, output_columns
from darwinlm.models.experts import Experts, hide_experts
from darwinlm.models.families import FAMILIES, family_of
from darwinlm.models.loading import load_dense
from darwinlm.models.pruned import load
from darwinlm.models.sites import sites_needed
from darwinlm.pipeline import prune
from darwinlm.plan import Plan
from darwinlm.search import sensitivity
from darwinlm.search.budgets import resource_limits
from darwinlm.search.neighbourhood import Neighbourhood
from darwinlm.search.sensitivity import measure_sensitivity

CPU = torch.device("cpu")
MIXTURES = [name for name, family in FAMILIES.items() if family.experts]
NOT_RENORMALISED = ("olmoe", {"norm_topk_prob": False})
CASES = [*((family, {}) for family in MIXTURES), NOT_RENORMALISED, ("olmoe", {"norm_topk_prob": True})]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    known = {}

    def get(family, **settings):
        key = family, str(settings)
        if key not in known:
            folder = make_checkpoint(family, tmp_path_factory.mktemp(family) / "dense", **settings)
            known[key] = load_dense(str(folder), "kv_group", CPU)
        return known[key]

    return get


def first_experts(dense):
    return next(site for site in dense.sites if site.routed)


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_experts_match_transformers_block(family, settings, mixture):
    dense = mixture(family, **settings)
    site = first_experts(dense)
    experts = Experts.of(dense.config, site, dense.weights)
    block = dense.model.model.layers[site.layer].get_submodule(family_of(dense.config).mlp)
    x_ND = torch.randn(50, dense.config.hidden_size, generator=torch.Generator().manual_seed(0))
    seen = []
    hook = block.get_submodule("experts").register_forward_hook(lambda _, inputs, output: seen.append(output))
    with torch.no_grad():
        block(x_ND[None])
        found_ND = experts.sum_of(x_ND, experts.gates(experts.logits(x_ND)))
    hook.remove()
    torch.testing.assert_close(found_ND, seen[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_removed_experts_match_masked_router(family, settings, mixture):
    dense = mixture(family, **settings)
    kept = {site.name: tuple(range(site.num_units))[1::2] for site in dense.sites if site.routed}
    cuts = {
        site.name: Cut(kept[site.name], output_columns(site, dense.weights[site.output_tensor], kept[site.name]))
        for site in dense.sites
        if site.routed
    }
    masked = build_model(dense.config, dense.sites, dense.weights, {})
    for site in dense.sites:
        if site.routed:
            hide_experts(masked, site, kept[site.name])
    tokens = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = masked(tokens).logits
        found = build_model(dense.config, dense.sites, dense.weights, cuts)(tokens).logits
        assert (expected - dense.model(tokens).logits).abs().max() > 0.01
    assert (expected - found).abs().max() < 1e-4 * expected.abs().max()


def statistics_of(dense, calibration, tmp_path):
    site = first_experts(dense)
    return site, dict(walk_blocks(dense, calibration, batch_size=3, scratch=tmp_path))[site]


def error_without(experts, statistics, gone):
    """Return the mean squared error of the layer's output relative to the stream, by masking the router."""
    x_ND, logits_NE = statistics.inputs_ND, experts.logits(statistics.inputs_ND)
    whole_ND = experts.sum_of(x_ND, experts.gates(logits_NE))
    logits_NE = logits_NE.index_fill(1, torch.tensor(sorted(gone), dtype=torch.long), -torch.inf)
    left_ND = experts.sum_of(x_ND, experts.gates(logits_NE))
    return float(((whole_ND - left_ND) / statistics.norms_N[:, None]).square().sum(1).mean())


@torch.no_grad()
@pytest.mark.parametrize(("family", "settings"), CASES)
def test_removal_order_smallest_error(family, settings, mixture, calibration, tmp_path):
    dense = mixture(family, **settings)
    site, statistics = statistics_of(dense, calibration, tmp_path)
    assert isinstance(statistics, ExpertStatistics) and len(statistics.inputs_ND) == calibration.numel()
    experts = Experts.of(dense.config, site, dense.weights)
    logits_NE = experts.logits(statistics.inputs_ND)
    order = removal_order(
        experts, statistics.inputs_ND, logits_NE, 1 / statistics.norms_N, site.num_units - site.routed
    )
    assert len(set(order)) == site.num_units - site.routed
    for step, expert in enumerate(order):
        errors = {
            other: error_without(experts, statistics, [*order[:step], other])
            for other in range(site.num_units)
            if other not in order[:step]
        }
        assert errors[expert] <= min(errors.values()) * (1 + 1e-4)


@torch.no_grad()
def test_removal_order_of_duplicate_experts(mixture, calibration, tmp_path):
    """With two equal experts of the highest norms, the first to go is still the one whose removal costs least."""
    dense = mixture("mixtral")
    site, statistics = statistics_of(dense, calibration, tmp_path)
    experts = Experts.of(dense.config, site, dense.weights)
    router_ED, gate_up_EJD, down_EDI = (
        one.clone() for one in (experts.router_ED, experts.gate_up_EJD, experts.down_EDI)
    )
    for tensor in (router_ED, gate_up_EJD, down_EDI):
        tensor[4] = tensor[1]
    down_EDI[[1, 4]] *= 5
    twins = replace(experts, router_ED=router_ED, gate_up_EJD=gate_up_EJD, down_EDI=down_EDI)
    gates_NE = twins.gates(twins.logits(statistics.inputs_ND))
    norms_E = torch.stack(
        [(gates_NE[:, e] * twins.output(e, statistics.inputs_ND).norm(dim=1)).mean() for e in range(twins.count)]
    )
    assert set(norms_E.topk(2).indices.tolist()) == {1, 4}
    order = removal_order(twins, statistics.inputs_ND, twins.logits(statistics.inputs_ND), 1 / statistics.norms_N, 1)
    alone = [error_without(twins, statistics, [e]) for e in range(twins.count)]
    assert order == [alone.index(min(alone))]


@torch.no_grad()
def test_prune_experts_errors(mixture, calibration, tmp_path):
    """Reported errors equal those of running the layer; refit lowers them, and removal raises them."""
    dense = mixture("granitemoe")
    site, statistics = statistics_of(dense, calibration, tmp_path)
    experts = Experts.of(dense.config, site, dense.weights)
    whole_ND = experts.sum_of(statistics.inputs_ND, experts.gates(experts.logits(statistics.inputs_ND)))
    snapshots, removal = prune_experts(experts, statistics, sizes=(5, 3, 2), damping=0.01, name=site.name)
    assert [len(one.kept) for one in snapshots] == [5, 3, 2]
    for before, after in itertools.pairwise(snapshots):
        assert set(after.kept) < set(before.kept) and after.error > before.error
    for one in snapshots:
        rows = list(one.kept)
        left = replace(experts.some(rows), down_EDI=experts.as_stored(one.weight_OK))
        found_ND = left.sum_of(statistics.inputs_ND, left.gates(left.logits(statistics.inputs_ND)))
        error = float(((whole_ND - found_ND) / statistics.norms_N[:, None]).square().sum(1).mean())
        assert one.error == pytest.approx(error, rel=1e-3)
        gone = set(range(site.num_units)) - set(rows)
        assert one.error < 0.99 * error_without(experts, statistics, gone)
    assert snapshots[-1].error < removal


@torch.no_grad()
def test_refit_experts_matches_least_squares(mixture, calibration):
    """Compare an expert that gets all tokens with least squares, with the ridge chosen on held-back tokens."""
    dense = mixture("mixtral")
    experts = Experts.of(dense.config, first_experts(dense), dense.weights)
    alone = replace(experts.some([0]), routed=1)
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(400, dense.config.hidden_size, generator=generator)
    wanted_ND = alone.channels(0, x_ND) @ torch.randn(64, 48, generator=generator)
    routed = replace(Routed.of(alone, ExpertStatistics(x_ND, torch.ones(400)), "one"), wanted_ND=wanted_ND)
    down_EDI, error = refit_experts(alone, routed, routed.logits_NE, 1e-6)
    expected_ID = torch.linalg.lstsq(alone.channels(0, x_ND).double(), wanted_ND.double()).solution
    torch.testing.assert_close(down_EDI[0].double(), expected_ID.T, atol=1e-3, rtol=1e-3)
    assert error < 1e-6


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_active_params_limit(family, mixture, calibration, tmp_path):
    """Count in the cut model: shared expert, norms and router are active for every token."""
    dense = mixture(family)
    build_database(dense, calibration, DatabaseRecipe(levels=4, batch_size=3), tmp_path)
    database = Database(tmp_path, kept=sites_needed(dense.config, dense.sites))
    space = database.space(dense.sites)
    limit = resource_limits(dense, space, ["active_params"], WorkloadRecipe(), tmp_path / "none")["active_params"]
    for levels in ((0,) * len(dense.sites), (1,) * len(dense.sites)):
        model = build_model(dense.config, dense.sites, dense.weights, database.cuts(dense.sites, levels, CPU))
        active = 0
        for name, tensor in model.named_parameters():
            share = dense.config.num_experts_per_tok / len(tensor) if ".experts." in name else 1
            active += round(tensor.numel() * share)
        assert limit.cost(levels) == active


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("unit", ["whole", "channels"])
def test_measure_latencies_of_mixtures(family, unit, mixture, calibration, tmp_path):
    source = mixture(family).source
    dense = load_dense(source, "kv_group", CPU, expert_unit=unit)
    build_database(dense, calibration, DatabaseRecipe(levels=4, batch_size=3, experts=unit), tmp_path)
    database = Database(tmp_path, kept=sites_needed(dense.config, dense.sites))
    space = database.space(dense.sites)
    workload = WorkloadRecipe(prompt_tokens=8, new_tokens=2)
    limit = resource_limits(dense, space, ["latency"], workload, tmp_path / "latency.json")["latency"]
    table = json.loads((tmp_path / "latency.json").read_text())
    for form, routed in (("mlp", False), ("experts", True)):
        sizes = {
            n
            for site, levels in zip(dense.sites, space.sites, strict=True)
            if site.kind == "mlp" and bool(site.routed) is routed
            for n in levels.units
        } - {0}
        assert set(table.get(form, ())) == set(map(str, sizes))
        assert not sizes or all(ns >= 0 for ns in table[form].values())
    assert limit.dense > limit.fixed > 0


def test_rare_experts_reported_and_not_refitted(mixture, calibration, tmp_path, caplog):
    dense = mixture("mixtral")
    site, statistics = statistics_of(dense, calibration, tmp_path)
    experts = Experts.of(dense.config, site, dense.weights)
    few = ExpertStatistics(statistics.inputs_ND[:40], statistics.norms_N[:40])
    snapshots, _ = prune_experts(experts, few, sizes=(4,), damping=0.01, name="layers.0.mlp")
    (said,) = [message for message in caplog.messages if "experts get fewer than 32 of the 40" in message]
    assert said.startswith("layers.0.mlp: ") and "provide more" in said
    assert torch.isfinite(snapshots[0].weight_OK).all()


def test_level_sizes_of_experts(mixture):
    site = first_experts(mixture("qwen3_moe"))
    assert level_sizes(site, 4) == (8, 6, 4, 2, 0)
    assert level_sizes(site, 10) == (8, 7, 6, 5, 4, 3, 2, 0)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_neighbourhood_and_sensitivity_of_experts(family, mixture, calibration, tmp_path, monkeypatch):
    # The routing of some tokens depends on rounding.
    monkeypatch.setattr(sensitivity, "fast_dtype", lambda device: torch.float32)
    dense = mixture(family)
    build_database(dense, calibration, DatabaseRecipe(levels=4, batch_size=3), tmp_path)
    database = Database(tmp_path, kept=sites_needed(dense.config, dense.sites))
    space = database.space(dense.sites)
    blocks = calibration[:2]
    base = Plan(levels=tuple(1 if site.routed else 0 for site in dense.sites))

    def cut(index, level):
        return database.cut(dense.sites[index], level, CPU)

    reference = DenseReference(dense.model, blocks)
    near = Neighbourhood(dense, reference, cut, base)
    for levels in (base.levels, tuple(2 if site.routed else 1 for site in dense.sites)):
        model = build_model(dense.config, dense.sites, dense.weights, database.cuts(dense.sites, levels, CPU))
        assert near.compare(levels).kl == pytest.approx(reference.compare(model).kl, rel=1e-3)

    found = measure_sensitivity(dense, cut, space, base, blocks, seed=0)
    for index, site in enumerate(dense.sites):
        if not site.routed:
            continue
        assert found.first[index][1] == found.second[index][1] == 0
        # First order: finite differences of the block's output, a thousandth of the way to level 2.
        model = build_model(dense.config, dense.sites, dense.weights, database.cuts(dense.sites, base.levels, CPU))
        expected = slope(dense, model, site, cut(index, 2), reference)
        assert found.first[index][2] == pytest.approx(expected, rel=0.1, abs=2e-4)


def slope(dense, model, site, cut, reference, step=1e-3):
    """Return the change of KL with the output of one mixture of `model` towards `cut`, by finite differences."""
    other = Experts.of(dense.config, site, cut_site(site, dense.weights, cut))
    block = model.model.layers[site.layer].get_submodule(family_of(dense.config).mlp)
    found = []
    for share in (step, -step):

        def hook(_, inputs, output, share=share):
            there_ND = other.sum_of(inputs[0], other.gates(other.logits(inputs[0])))
            return output + share * (there_ND - output)

        handle = block.get_submodule("experts").register_forward_hook(hook)
        found.append(reference.compare(model).kl)
        handle.remove()
    return (found[0] - found[1]) / (2 * step)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_run_of_mixture(family, mixture, text, tmp_path):
    # Experts as small as a KV group, so that many plans meet the budget.
    dense = mixture(family, intermediate_size=16)
    settings = {**SETTINGS, "data.source": str(text), "search.uniform": False}
    run = prune(dense.source, target=0.7, out=tmp_path / "run", settings=settings)
    model = load(run.path / "model")
    assert model.num_parameters() <= 0.7 * dense.parameters
    counts = [model.config.layer(layer) for layer in range(3)]
    assert all(getattr(one, first_experts(dense).size) >= 2 for one in counts)
    entry = inspect(str(run.path / "model"))[0]
    assert [layer["mlp"]["kept"] for layer in entry["layers"] if layer["mlp"]["unit"] == "experts"] == [
        getattr(counts[site.layer], site.size) for site in dense.sites if site.routed
    ]
    facts = json.loads((run.path / "report" / "metrics.json").read_text())
    assert [layer["mlp"] for layer in facts["layers"]] == [layer["mlp"] for layer in entry["layers"]]
    assert " experts" in (run.path / "report" / "index.html").read_text()
    again = prune(run.path / "model", target=0.85, out=tmp_path / "again", settings=settings)
    assert load(again.path / "model").num_parameters() < model.num_parameters()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "model"), [("mixtral", "MixtralForCausalLM"), ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM")]
)
def test_uniform_run_exports_native_mixture(family, model, mixture, text, tmp_path):
    """Search for uniform plans, the default for mixtures."""
    settings = {**SETTINGS, "data.source": str(text)}
    dense = mixture(family, intermediate_size=16)
    run = prune(dense.source, target=0.8, out=tmp_path / "run", settings=settings)
    done = export_model(run.path, "hf-native")
    assert done.proof is not None and done.proof.difference < 1e-4
    native = AutoModelForCausalLM.from_pretrained(done.path)
    setting = first_experts(dense).size
    assert type(native).__name__ == model
    assert getattr(native.config, setting) < getattr(dense.config, setting)


def test_pruned_mixture_with_load_balancing_runs(tmp_path):
    """Its config enables a loss that needs the same number of experts in all layers."""
    folder = make_checkpoint("mixtral", tmp_path / "dense", output_router_logits=True)
    dense = load_dense(str(folder), "kv_group", CPU)
    site = first_experts(dense)
    cut = Cut((0, 2, 5), output_columns(site, dense.weights[site.output_tensor], (0, 2, 5)))
    model = build_model(dense.config, dense.sites, dense.weights, {site.name: cut})
    tokens = torch.randint(0, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(1))
    assert torch.isfinite(model(tokens, labels=tokens).loss)
    assert model.generate(tokens, max_new_tokens=2, do_sample=False).shape == (1, 11)


def test_missing_expert_weights_refused(mixture, tmp_path):
    folder = make_checkpoint("mixtral", tmp_path / "dense")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing a part of model\.layers\.1\.mlp\.experts\.gate_up_proj; download"):
        load_dense(str(folder), "kv_group", CPU)


def test_make_config_of_mixtures():
    assert {family: make_config(family).num_experts_per_tok for family in MIXTURES} == dict.fromkeys(MIXTURES, 2)
