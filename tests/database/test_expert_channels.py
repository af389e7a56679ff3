"""Tests of expert channels as units: the pruned layer equals the dense layer with masked channels."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from helpers import SETTINGS, VOCABULARY, make_checkpoint
from transformers import AutoModelForCausalLM

from darwinlm import UserError
from darwinlm.commands.inspect import inspect
from darwinlm.config.recipe import DatabaseRecipe, WorkloadRecipe
from darwinlm.database.build import build_database
from darwinlm.database.expert_channels import prune_expert_channels
from darwinlm.database.grams import ExpertStatistics, walk_blocks
from darwinlm.database.levels import level_sizes
from darwinlm.database.solver import prune_site
from darwinlm.database.store import Database
from darwinlm.export.hf import save_model
from darwinlm.export.targets import export_model
from darwinlm.models.cutting import Cut, build_model, output_columns
from darwinlm.models.experts import Experts
from darwinlm.models.families import FAMILIES, family_of
from darwinlm.models.loading import load_dense
from darwinlm.models.pruned import load
from darwinlm.models.sites import sites_needed
from darwinlm.pipeline import prune
from darwinlm.search.budgets import resource_limits

CPU = torch.device("cpu")
MIXTURES = [name for name, family in FAMILIES.items() if family.experts]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    known = {}

    def get(family):
        if family not in known:
            folder = make_checkpoint(family, tmp_path_factory.mktemp(family) / "dense")
            known[family] = load_dense(str(folder), "kv_group", CPU, expert_unit="channels")
        return known[family]

    return get


def random_cut(dense, site, share=0.5, seed=0):
    """Cut random channels, different in every expert, without refit."""
    generator = torch.Generator().manual_seed(seed)
    count = round(share * site.num_units)
    channels_EK = torch.stack(
        [torch.randperm(site.num_units, generator=generator)[:count].sort().values for _ in range(site.experts)]
    )
    others = [1, 1]
    others[site.output_dim - 1] = -1
    weight = dense.weights[site.output_tensor].take_along_dim(
        channels_EK.view(site.experts, *others), dim=site.output_dim
    )
    return Cut(tuple(range(count)), weight, channels=channels_EK)


def masked_weights(dense, cuts):
    """Return the dense weights with zeros in the output projections of removed channels."""
    weights = dict(dense.weights)
    for site in dense.sites:
        if site.name in cuts:
            whole = weights[site.output_tensor]
            # Dimensions: experts * channels * rows.
            masked = torch.zeros_like(whole.movedim(site.output_dim, 1))
            for expert, channels in enumerate(cuts[site.name].channels.tolist()):
                masked[expert, channels] = whole.movedim(site.output_dim, 1)[expert, channels]
            weights[site.output_tensor] = masked.movedim(1, site.output_dim).contiguous()
    return weights


def tokens_of(length=20):
    return torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", MIXTURES)
def test_narrowed_experts_match_masked_experts(family, mixture, tmp_path):
    dense = mixture(family)
    cuts = {site.name: random_cut(dense, site, seed=site.layer) for site in dense.sites if site.experts}
    cut = build_model(dense.config, dense.sites, dense.weights, cuts, trainable=True)
    masked = build_model(dense.config, dense.sites, masked_weights(dense, cuts), {}, trainable=True)
    tokens = tokens_of()
    for model in (cut, masked):
        model(tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        expected, found = masked(tokens).logits, cut(tokens).logits
        assert (expected - dense.model(tokens).logits).abs().max() > 0.01
        assert (expected - found).abs().max() < 1e-4 * expected.abs().max()
        # One token at a time, with the cache.
        whole = cut.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False)
        assert cut.generate(tokens, max_new_tokens=4, do_sample=False).equal(whole)
    for name, parameter in cut.named_parameters():
        wanted = masked.get_parameter(name).grad
        if wanted.shape == parameter.shape:  # the router and all uncut parameters
            torch.testing.assert_close(parameter.grad, wanted, atol=1e-4, rtol=1e-3)
    routers = [name for name, _ in cut.named_parameters() if name.endswith(f"{family_of(dense.config).router}.weight")]
    assert all(cut.get_parameter(name).grad.abs().sum() > 0 for name in routers) and routers

    save_model(cut, torch.float32, tmp_path)
    saved = load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(saved(tokens).logits, found)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_narrowed_experts_match_cut_model(family, mixture):
    dense = mixture(family)
    site = next(site for site in dense.sites if site.experts)
    cut = random_cut(dense, site)
    experts = Experts.of(dense.config, site, dense.weights).narrowed(cut.channels)
    model = build_model(dense.config, dense.sites, dense.weights, {site.name: cut})
    again = Experts.of(model.config, site, model.state_dict())
    torch.testing.assert_close(experts.gate_up_EJD, again.gate_up_EJD)
    torch.testing.assert_close(experts.down_EDI, again.down_EDI)


def statistics_of(dense, calibration, tmp_path):
    site = next(site for site in dense.sites if site.experts)
    statistics = dict(walk_blocks(dense, calibration, batch_size=3, scratch=tmp_path))[site]
    assert isinstance(statistics, ExpertStatistics)
    return site, statistics, Experts.of(dense.config, site, dense.weights)


@torch.no_grad()
@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_prune_expert_channels_errors(family, mixture, calibration, tmp_path):
    dense = mixture(family)
    site, statistics, experts = statistics_of(dense, calibration, tmp_path)
    x_ND = statistics.inputs_ND
    whole_ND = experts.sum_of(x_ND, experts.gates(experts.logits(x_ND)))
    sizes = (48, 32, 16)
    snapshots, removal = prune_expert_channels(experts, statistics, sizes=sizes, damping=0.01, name=site.name)

    def error_of(channels_EK, down_EDI=None):
        left = experts.narrowed(channels_EK)
        left = left if down_EDI is None else replace(left, down_EDI=down_EDI)
        found_ND = left.sum_of(x_ND, left.gates(left.logits(x_ND)))
        return float(((whole_ND - found_ND) / statistics.norms_N[:, None]).square().sum(1).mean())

    for size, one in zip(sizes, snapshots, strict=True):
        assert one.kept == tuple(range(size)) and one.channels_EK.shape == (site.experts, size)
        assert (one.channels_EK.diff(dim=1) > 0).all()
        down_EDI = experts.as_stored(one.weight_OK)
        assert one.error == pytest.approx(error_of(one.channels_EK, down_EDI), rel=1e-3)
        assert one.error < 0.9 * error_of(one.channels_EK)
    for before, after in itertools.pairwise(snapshots):
        assert after.error > before.error
        for more, fewer in zip(before.channels_EK.tolist(), after.channels_EK.tolist(), strict=True):
            assert set(fewer) < set(more)
    assert snapshots[-1].error < removal


@torch.no_grad()
def test_prune_expert_channels_single_expert(mixture, calibration, tmp_path):
    dense = mixture("mixtral")
    site, statistics, experts = statistics_of(dense, calibration, tmp_path)
    alone = replace(experts.some([0]), routed=1)
    (one,), _ = prune_expert_channels(alone, statistics, sizes=(20,), damping=0.01, name=site.name)
    x_NI = alone.channels(0, statistics.inputs_ND) / statistics.norms_N[:, None]
    (expected,) = prune_site(
        alone.down_EDI[0], x_NI.T @ x_NI / len(x_NI), columns_per_unit=1, sizes=(20,), damping=0.01
    )
    assert tuple(one.channels_EK[0].tolist()) == expected.kept
    assert one.error <= expected.error * (1 + 1e-3)


@torch.no_grad()
def test_prune_expert_channels_unused_expert(mixture, calibration, tmp_path, caplog):
    dense = mixture("mixtral")
    site, statistics, experts = statistics_of(dense, calibration, tmp_path)
    # Low enough that no token is routed to it, but finite.
    logits = experts.logits(statistics.inputs_ND)
    bias_E = torch.zeros(experts.count)
    bias_E[3] = float(logits.min() - logits.max())
    lonely = replace(experts, router_bias_E=bias_E)
    assert not lonely.gates(lonely.logits(statistics.inputs_ND))[:, 3].any()
    (one,), _ = prune_expert_channels(lonely, statistics, sizes=(20,), damping=0.01, name=site.name)
    assert any("1 of 6 experts get fewer than 32" in message for message in caplog.messages)
    x_NI = lonely.channels(3, statistics.inputs_ND) * lonely.logits(statistics.inputs_ND).softmax(1)[:, 3, None]
    x_NI /= statistics.norms_N[:, None]
    (expected,) = prune_site(lonely.down_EDI[3], x_NI.T @ x_NI, columns_per_unit=1, sizes=(20,), damping=0.01)
    assert tuple(one.channels_EK[3].tolist()) == expected.kept


@pytest.mark.parametrize("family", MIXTURES)
def test_database_parameter_counts(family, mixture, calibration, tmp_path):
    dense = mixture(family)
    build_database(dense, calibration, DatabaseRecipe(levels=4, batch_size=3, experts="channels"), tmp_path)
    database = Database(tmp_path, kept=sites_needed(dense.config, dense.sites))
    space = database.space(dense.sites)
    limit = resource_limits(dense, space, ["active_params"], WorkloadRecipe(), tmp_path / "none")["active_params"]
    for level in range(3):
        levels = tuple(min(level, len(site.units) - 1) for site in space.sites)
        model = build_model(dense.config, dense.sites, dense.weights, database.cuts(dense.sites, levels, CPU))
        assert model.num_parameters() == space.parameters(levels)
        active = 0
        for name, tensor in model.named_parameters():
            active += round(tensor.numel() * (2 / len(tensor) if ".experts." in name else 1))
        assert limit.cost(levels) == active


def test_level_sizes(mixture):
    dense = mixture("qwen3_moe")
    site = next(site for site in dense.sites if site.experts)
    assert level_sizes(site, 4) == (16, 12, 8, 4, 0)
    assert site.name in sites_needed(dense.config, dense.sites)
    wide = replace(site, num_units=768)
    assert all(size % 8 == 0 for levels in (5, 25, 48) for size in level_sizes(wide, levels))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_run_exports_native_model(family, mixture, text, tmp_path):
    """Runs on mixtures can be exported natively by default."""
    dense = mixture(family)
    settings = {**SETTINGS, "data.source": str(text), "database.experts": "channels"}
    run = prune(dense.source, target=0.7, out=tmp_path / "run", settings=settings)
    done = export_model(run.path, "hf-native")
    assert done.proof is not None and done.proof.difference < 1e-4
    native = AutoModelForCausalLM.from_pretrained(done.path)
    site = next(site for site in dense.sites if site.experts)
    assert native.num_parameters() <= 0.7 * dense.parameters
    assert getattr(native.config, site.size) < getattr(dense.config, site.size)
    layers = inspect(str(run.path / "model"))[0]["layers"]
    found = [layer["mlp"]["kept"] for layer in layers if layer["layer"] == site.layer]
    assert found == [getattr(native.config, site.size)]
    facts = json.loads((run.path / "report" / "metrics.json").read_text())
    assert [layer["mlp"] for layer in facts["layers"]] == [layer["mlp"] for layer in layers]


@pytest.mark.slow
def test_run_with_experts_then_channels(text, tmp_path):
    """Prune experts in a first run, and the channels of the remaining ones in a second."""
    folder = make_checkpoint("mixtral", tmp_path / "dense")
    settings = {**SETTINGS, "data.source": str(text)}
    first = prune(folder, target=0.8, out=tmp_path / "first", settings=settings)
    second = prune(
        first.path / "model", target=0.7, out=tmp_path / "second", settings={**settings, "database.experts": "channels"}
    )
    fewer, narrower = (load(run.path / "model").config for run in (first, second))
    assert fewer.layer(0).num_local_experts == narrower.layer(0).num_local_experts < 8
    assert narrower.layer(0).intermediate_size < fewer.layer(0).intermediate_size == 64


def test_model_without_experts_refused(checkpoint, text, tmp_path):
    with pytest.raises(UserError, match=r"database\.experts=channels: .* has no experts"):
        prune(
            checkpoint("llama"), target=0.8, out=tmp_path / "run",
            settings={**SETTINGS, "data.source": str(text), "database.experts": "channels"},
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_cut_of_equal_channels_needs_no_list(mixture):
    dense = mixture("gpt_oss")
    site = next(site for site in dense.sites if site.experts)
    kept = (1, 4, 9)
    weight = output_columns(site, dense.weights[site.output_tensor], kept)
    listed = Cut(kept, weight, channels=torch.tensor([kept] * site.experts))
    tokens = tokens_of()
    with torch.no_grad():
        found, expected = (
            build_model(dense.config, dense.sites, dense.weights, {site.name: cut})(tokens).logits
            for cut in (Cut(kept, weight), listed)
        )
    assert found.equal(expected)
