"""Tests of peer methods: sizes against counted parameters, models against masked ones, scores against plain loops."""

import itertools
import json

import compare
import pytest
import torch
import torch_pruner
import torch_pruning
from calibrated import Calibrated
from even_widths import activation_scores, by_activations, by_weights, even_cuts, even_shapes, weight_scores
from helpers import SETTINGS, VOCABULARY
from second_order import by_second_order, refitted_cuts
from whole_layers import by_influence

from darwinlm.config.loading import load_recipe
from darwinlm.data.corpus import read_corpus
from darwinlm.evaluation.measure import parameters_of
from darwinlm.metrics.kl import DenseReference
from darwinlm.models.cutting import build_model, count_parameters
from darwinlm.models.loading import load_dense

IDS = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def calibrated(checkpoint, calibration):
    """Statistics of an untied model with biases everywhere."""
    return Calibrated(load_dense(str(checkpoint("llama")), "kv_group", torch.device("cpu")), calibration)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def target(dense, fraction):
    return int(dense.parameters * fraction)


@pytest.mark.parametrize("peer", [by_weights, by_activations, by_second_order, torch_pruner.by_taylor])
@pytest.mark.parametrize("fraction", [0.9, 0.7])
def test_peer_sizes_meet_target(calibrated, peer, fraction):
    dense = calibrated.dense
    channel = 3 * dense.config.hidden_size + 2
    found = {name: parameters_of(model) for name, model in peer(calibrated, target(dense, fraction))}
    assert found
    for size in found.values():
        assert 0 <= target(dense, fraction) - size < dense.config.num_hidden_layers * channel


@pytest.mark.parametrize("fraction", [0.85, 0.7])
def test_by_influence_size_nearest_to_target(calibrated, fraction):
    dense = calibrated.dense
    layer = sum(count_parameters(site, dense.shapes, range(site.num_units)) for site in dense.sites[:2])
    [(_, model)] = by_influence(calibrated, target(dense, fraction))
    assert abs(parameters_of(model) - target(dense, fraction)) <= layer / 2


def test_torch_pruner_example_size(checkpoint, calibration):
    dense = load_dense(str(checkpoint("mistral")), "kv_group", torch.device("cpu"))
    calibrated = Calibrated(dense, calibration)
    [(name, model)] = torch_pruner.as_in_the_example(calibrated, target(dense, 0.8))
    ratio = float(name.split()[1].rstrip(","))
    assert parameters_of(model) == torch_pruner._example_size(dense, ratio) <= target(dense, 0.8)
    assert torch_pruner._example_size(dense, ratio - 0.001) > target(dense, 0.8)
    assert model.config.hidden_size < dense.config.hidden_size


def masked(dense, cuts):
    """Build the dense model with output projections padded with zeros to the dense sizes."""
    weights = dict(dense.weights)
    for site in dense.sites:
        cut = cuts.get(site.name)
        if cut is not None:
            whole = torch.zeros_like(weights[f"{site.output}.weight"])
            for place, unit in enumerate(cut.kept):
                for column in range(site.columns_per_unit):
                    source = cut.output_weight[:, place * site.columns_per_unit + column]
                    whole[:, unit * site.columns_per_unit + column] = source
            weights[f"{site.output}.weight"] = whole
    return build_model(dense.config, dense.sites, weights, {})


def test_even_widths_match_masked_dense_model(calibrated):
    dense = calibrated.dense
    shape = even_shapes(dense, target(dense, 0.7))[-1]
    for cuts in (
        even_cuts(dense, weight_scores(dense), shape),
        even_cuts(dense, activation_scores(calibrated), shape),
        refitted_cuts(calibrated, [shape])[shape],
    ):
        assert {len(cuts[site.name].kept) for site in dense.sites if site.kind == "mlp"} == {shape.channels}
        model = build_model(dense.config, dense.sites, dense.weights, cuts)
        torch.testing.assert_close(logits(model), logits(masked(dense, cuts)), rtol=1e-4, atol=1e-4)


def test_even_cuts_keep_highest_scores(calibrated):
    dense, scores = calibrated.dense, weight_scores(calibrated.dense)
    cuts = even_cuts(dense, scores, even_shapes(dense, target(dense, 0.7))[-1])
    assert cuts
    for name, cut in cuts.items():
        gone = sorted(set(range(len(scores[name]))) - set(cut.kept))
        assert scores[name][list(cut.kept)].min() >= scores[name][gone].max()


def test_scores_match_plain_loop(calibrated):
    dense = calibrated.dense
    seen = {}
    hooks = [
        dense.model.get_submodule(site.output).register_forward_pre_hook(
            lambda _, inputs, name=site.name: seen.setdefault(name, []).append(inputs[0].flatten(0, -2))
        )
        for site in dense.sites
    ]
    logits_of_all = dense.model(calibrated.blocks_BT)
    for hook in hooks:
        hook.remove()
    assert torch.isfinite(logits_of_all.logits).all()
    for site in dense.sites[:2]:
        inputs = torch.cat(seen[site.name])
        output = dense.weights[f"{site.output}.weight"]
        prefix = f"model.layers.0.{'self_attn' if site.kind == 'attention' else 'mlp'}"
        for unit in range(site.num_units):
            columns = range(unit * site.columns_per_unit, (unit + 1) * site.columns_per_unit)
            wanda = sum(output[:, j].abs().sum() * inputs[:, j].square().sum().sqrt() for j in columns)
            assert activation_scores(calibrated)[site.name][unit] == pytest.approx(wanda.item(), rel=1e-3)
            power = sum(output[:, j].square().sum() for j in columns)
            # Two KV heads of eight rows each serve three query heads of eight rows.
            names = (
                {"q_proj": 24, "k_proj": 8, "v_proj": 8} if site.kind == "attention" else {"gate_proj": 1, "up_proj": 1}
            )
            for name, rows in names.items():
                for kind in ("weight", "bias"):
                    power += dense.weights[f"{prefix}.{name}.{kind}"][unit * rows : (unit + 1) * rows].square().sum()
            assert weight_scores(dense)[site.name][unit] == pytest.approx(power.item(), rel=1e-4)


def test_by_influence_removes_least_changing_layer(calibrated):
    dense = calibrated.dense
    with torch.no_grad():
        states = [dense.model.model.embed_tokens(calibrated.blocks_BT)]
        for number in range(dense.config.num_hidden_layers):
            above = build_model(dense.config, dense.sites, dense.weights, {})
            above.model.layers, above.model.norm = above.model.layers[: number + 1], torch.nn.Identity()
            states.append(above.model(calibrated.blocks_BT, use_cache=False).last_hidden_state)
    # The embedding of the padding token is zero.
    units = [one / one.norm(dim=-1, keepdim=True).clamp_min(1e-8) for one in states]
    cosines = [(one * other).sum(-1).mean().item() for one, other in itertools.pairwise(units)]
    assert calibrated.influence == pytest.approx([1 - cosine for cosine in cosines], abs=1e-4)
    layer = sum(count_parameters(site, dense.shapes, range(site.num_units)) for site in dense.sites[:2])
    [(name, model)] = by_influence(calibrated, dense.parameters - layer)
    assert name == f"without layers {max(range(3), key=lambda number: cosines[number])}"
    assert parameters_of(model) == dense.parameters - layer


def test_torch_pruning_keeps_highest_taylor_scores(calibrated, monkeypatch):
    dense = calibrated.dense
    made = []
    express = torch_pruner.express

    def follow(model, dense):
        made.append(model)
        return express(model, dense)

    monkeypatch.setattr(torch_pruner, "express", follow)
    for model in [model for _, model in torch_pruner.by_taylor(calibrated, target(dense, 0.75))]:
        own = made.pop(0)
        torch.testing.assert_close(logits(model), logits(own), rtol=1e-4, atol=1e-4)
        # All KV heads are kept, each with the same number of query heads.
        assert {layer.self_attn.k_proj.out_features for layer in model.model.layers} == {16}
        mlp, width = model.model.layers[1].mlp, dense.config.hidden_size
        if mlp.gate_proj.out_features == dense.config.intermediate_size:
            continue
        # Absolute weight times gradient, summed over all weights of a channel.
        scores = sum(
            (dense.weights[name] * calibrated.gradients[name]).abs().sum(dim)
            for name, dim in (
                ("model.layers.1.mlp.gate_proj.weight", 1),
                ("model.layers.1.mlp.up_proj.weight", 1),
                ("model.layers.1.mlp.down_proj.weight", 0),
            )
        )
        kept = scores.topk(mlp.gate_proj.out_features).indices.sort().values
        expected = dense.weights["model.layers.1.mlp.down_proj.weight"][:, kept]
        assert mlp.down_proj.weight.shape[0] == width
        torch.testing.assert_close(mlp.down_proj.weight.detach(), expected)


def test_calibrated_gradients_match_finite_differences(calibrated, monkeypatch):
    import calibrated as module

    monkeypatch.setattr(module, "fast_dtype", lambda device: torch.float32)
    found = Calibrated(calibrated.dense, calibrated.blocks_BT).gradients
    name = "model.layers.2.mlp.down_proj.weight"
    step = torch.randn(found[name].shape, generator=torch.Generator().manual_seed(0))

    def loss(size):
        dense = calibrated.dense
        weights = dense.weights | {name: dense.weights[name] + size * step}
        reference = DenseReference(dense.model, calibrated.blocks_BT)
        model = build_model(dense.config, dense.sites, weights, {})
        return torch.tensor(reference.compare(model).perplexity).log().item()

    slope = (loss(0.01) - loss(-0.01)) / 0.02
    assert (found[name] * step).sum().item() == pytest.approx(slope, rel=0.02)


def test_torch_pruner_express_rejects_changed_model(calibrated):
    model = torch_pruner.native_model(calibrated.dense)
    torch_pruner._set_gradients(model, calibrated.gradients)
    importance = torch_pruning.importance.GroupTaylorImportance()
    ignored = [module for layer in model.model.layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    torch_pruner.prune(model, importance, channels=0.5, heads=0.0, ignored=ignored, multiple=None)
    model.model.layers[0].mlp.act_fn = torch.nn.Identity()
    with pytest.raises(AssertionError, match="not the model"):
        torch_pruner.express(model, calibrated.dense)


def test_best_takes_lowest_kl(calibrated):
    dense = calibrated.dense
    score = DenseReference(dense.model, IDS)
    models = list(by_weights(calibrated, target(dense, 0.8)))
    _, model = compare.best(iter(models), score)
    assert score.compare(model).kl == min(score.compare(one).kl for _, one in models)


def test_ours_meets_size_and_recovered_copies_model(calibrated, text, tmp_path):
    dense = calibrated.dense
    recipe = load_recipe("quick", {**SETTINGS, "model": dense.source, "target": 0.7, "data.source": str(text)})
    corpus = read_corpus(recipe.data, dense.tokenizer, 0)
    before = {key: tensor.clone() for key, tensor in dense.weights.items()}
    _, model = compare.ours(dense, corpus, recipe, 0.7, tmp_path)
    assert parameters_of(model) <= target(dense, 0.7)
    pruned = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trained = compare.recovered(model, dense.model, corpus, 64, 0)
    assert all(torch.equal(tensor, before[key]) for key, tensor in dense.weights.items())
    assert all(torch.equal(tensor, pruned[key]) for key, tensor in model.state_dict().items())
    assert any(not torch.equal(tensor, pruned[key]) for key, tensor in trained.state_dict().items())


def test_rows_stored_and_summarized(tmp_path):
    rows = compare.Rows(tmp_path / "rows.jsonl")
    rows.add({"method": "dense", "perplexity": 20.0})
    row = {
        "target": 0.8, "recovery_tokens": 8192, "share": 0.7999, "perplexity": 40.0, "recovered_perplexity": 30.0
    }  # fmt: skip
    for seed, kl in ((0, 0.4), (1, 0.6)):
        rows.add({"method": "ours", "seed": seed, "kl": kl, "recovered_kl": kl / 2, **row})
    rows.add({"method": "other", "seed": 0, "kl": 1.0, "recovered_kl": 0.1, **row})
    held_out = {"held_out_kl": 0.3, "held_out_recovered_kl": 0.2, "recovery_tokens": 16_384}
    rows.add({"method": "ours", "seed": 0, "kl": 0.4, "recovered_kl": 0.1, **row, **held_out})
    again = compare.Rows(tmp_path / "rows.jsonl")
    assert again.rows == rows.rows
    assert not again.lacks({"method": "ours", "seed": 1})
    assert again.lacks({"method": "ours", "seed": 2})
    lines = compare.table(again.rows).splitlines()
    assert [line for line in lines if line.startswith(("Dense", "At", "| o"))] == [
        "Dense: perplexity 20.00.",
        "At 0.8 of all parameters, 8,192 tokens of recovery:",
        "| other | 0.7999 | 1.000 | 40.0 | 0.100 | 30.0 | - | - | 1 |",
        "| ours | 0.7999 ± 0.0000 | 0.500 ± 0.141 | 40.0 ± 0.0 | 0.250 ± 0.071 | 30.0 ± 0.0 | - | - | 2 |",
        "At 0.8 of all parameters, 16,384 tokens of recovery:",
        "| ours | 0.7999 | 0.400 | 40.0 | 0.100 | 30.0 | 0.300 | 0.200 | 1 |",
    ]
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["method"] == "dense"
