"""Tests of training curves: resumed rows, equal training of all methods, peers against independent computations."""

import itertools
import json
from xml.etree import ElementTree

import efficiency_rows
import flap
import learnt_masks
import pytest
import slicegpt
import torch
from calibrated import Calibrated
from curve_training import DenseStates, Settings, Trainee, kl_loss
from efficiency_report import Curve, apart, chosen_point, curves, need
from efficiency_rows import METHODS, Options, Row, grid, run_row
from forms import facts_of, revive, tensors_of
from helpers import SETTINGS, VOCABULARY

from darwinlm.evaluation.measure import parameters_of
from darwinlm.models.cutting import build_model, count_parameters
from darwinlm.models.loading import load_dense
from darwinlm.recovery.objective import Objective

IDS = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))
CHANGES = {key: value for key, value in SETTINGS.items() if key.startswith(("data", "database", "search"))}
ROWS = [method for method in METHODS if method != "wanda"]


@pytest.fixture(scope="module")
def dense(checkpoint):
    return load_dense(str(checkpoint("qwen3")), "kv_group", torch.device("cpu"))


@pytest.fixture(scope="module")
def calibrated(checkpoint, calibration):
    """Statistics of an untied model with biases everywhere."""
    return Calibrated(load_dense(str(checkpoint("llama")), "kv_group", torch.device("cpu")), calibration)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def options(text, folder, tokens):
    return Options(
        data=str(text), evaluation=str(text), work=folder / "work", results=folder / "results", tokens=tokens,
        mask_tokens=64, judge_tokens=64, first=32, changes=CHANGES, training=Settings(warm_up_steps=2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(checkpoint, text, tmp_path_factory):
    """Folder, rows (every method but one, 128 tokens) and settings of a finished benchmark."""
    folder, settings = tmp_path_factory.mktemp("rows"), {}
    found = {
        method: run_row(Row(str(checkpoint("llama")), method, 0.7, 0), options(text, folder, 128), settings)
        for method in ROWS
    }
    return folder, found, settings


def without_clocks(row):
    return {key: value for key, value in row.items() if not key.endswith("seconds")}


def test_methods_meet_size_and_share_points(finished):
    _, rows, settings = finished
    [setting] = settings.values()
    dense = setting.dense
    layer = sum(count_parameters(site, dense.shapes, range(site.num_units)) for site in dense.sites[:2])
    for method, row in rows.items():
        missing = int(dense.parameters * 0.7) - row["parameters"]
        # The tolerance is the smallest unit of a method: a layer for depth pruning, an axis for SliceGPT, otherwise a
        # channel in each layer or the finest level of the database.
        tolerance = {"layers": layer / 2, "slicegpt": 0.04 * dense.parameters, "ours": layer / 4}.get(method, 3 * 160)
        assert -(tolerance if method == "layers" else 0) <= missing <= tolerance, method
        begin = 64 if method == "masks" else 0
        assert [point["tokens"] for point in row["points"]] == [at for at in (0, 32, 64, 128) if at >= begin]
        assert all(point["recovery_tokens"] == point["tokens"] - begin for point in row["points"])
        for key in ("kl_wikitext", "kl_held_out", "ppl_wikitext", "ppl_held_out"):
            assert all(point[key] > 0 for point in row["points"])
        assert row["text"].get("masks", 0) == begin
        assert {"torch", "transformers", "torch-pruning"} <= row["versions"].keys()


def test_run_row_resumes_to_same_numbers(finished, checkpoint, text, tmp_path, monkeypatch):
    _, rows, _ = finished
    row, steps = Row(str(checkpoint("llama")), "even", 0.7, 0), itertools.count(1)

    def stop(loss):
        if next(steps) in (2, 4):
            raise KeyboardInterrupt

    every = Settings(warm_up_steps=2, checkpoint_steps=1)
    whole = options(text, tmp_path, 128)
    whole = Options(**{**vars(whole), "training": every})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_row(row, whole, {}, stop)
    # First to fewer tokens, then to all.
    run_row(row, Options(**{**vars(whole), "tokens": 64}), {}, stop)
    again = run_row(row, whole, {}, stop)
    assert without_clocks(again) == without_clocks(rows["even"])
    assert json.loads((tmp_path / "results" / f"{row.name}.json").read_text()) == again
    before = next(steps)
    assert run_row(row, whole, {}, stop) == again
    assert next(steps) == before + 1, "a finished row is not trained again"
    with pytest.raises(SystemExit, match="other settings"):
        run_row(row, Options(**{**vars(whole), "training": Settings(rate_factor=2.0)}), {}, stop)


def test_results_contain_no_local_paths(finished):
    folder, rows, _ = finished
    for file in (folder / "results").glob("*.json"):
        assert str(folder) not in file.read_text()
    assert rows


def test_grid():
    assert grid(8, 0, 64) == [0, 8, 16, 32, 64]
    assert grid(8, 0, 50) == [0, 8, 16, 32, 50]
    assert grid(8, 24, 64) == [24, 32, 64]
    assert grid(8, 64, 64) == [64]


@pytest.fixture
def states(dense, monkeypatch, tmp_path):
    for module in ("curve_training", "calibrated"):
        monkeypatch.setattr(f"{module}.fast_dtype", lambda device: torch.float32)
    blocks = torch.randint(0, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(5))
    return DenseStates(dense, blocks, tmp_path / "states")


def pruned(dense, trainable=True):
    """A model of 80% of the parameters, cut by random gates."""
    cuts = learnt_masks.Gates(dense.sites, dense.shapes, 0.0)
    with torch.no_grad():
        cuts.log_odds.copy_(torch.randn(cuts.log_odds.shape, generator=torch.Generator().manual_seed(0)))
    model = learnt_masks.cut(dense, dense.weights, cuts, int(dense.parameters * 0.8))
    tensors = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    return revive(dense, facts_of(model), tensors, trainable=trainable)


def test_kl_loss_and_gradients(dense, states):
    one, other = pruned(dense), pruned(dense)
    loss = kl_loss(one, states, [1, 6])
    loss.backward()
    ids = states.blocks_BT[[1, 6]]
    expected = Objective(other, dense.model, 1.0)(ids, ids)["loss"]
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, parameter), second in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, second.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_trainee_step_matches_adamw(dense, states, tmp_path):
    model, start = pruned(dense), pruned(dense)
    settings = Settings(warm_up_steps=4)
    trainee = Trainee(model, states, settings, tmp_path, passed=2)
    trainee.train(2)
    loss = kl_loss(start, states, [2, 3])
    loss.backward()
    moved = 0
    for (name, parameter), before in zip(model.named_parameters(), start.parameters(), strict=True):
        size = before.detach().square().mean().sqrt()
        # The first step is the learning rate times the sign of the gradient, unless that is negligible.
        clear = before.grad.abs() > 1e-4
        steps = (parameter - before).detach()[clear] / size
        expected = -settings.rate(24).value / 4 * before.grad[clear].sign()
        torch.testing.assert_close(steps, expected, rtol=0.02, atol=1e-8, msg=name)
        moved += int(clear.sum())
    assert moved > 1000


def test_dense_states_cached_on_disk(dense, states):
    first = states[3]
    with torch.no_grad():
        expected = dense.model.model(states.blocks_BT[3:4], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(first, expected)
    again = DenseStates(dense, states.blocks_BT, states._folder)
    again.__dict__["_model"] = None  # nothing is left to compute
    assert torch.equal(again[3], first)


def test_revive_model_from_tensors(calibrated):
    for make in (flap.by_fluctuation, slicegpt.by_rotation):
        [(_, model)] = make(calibrated, int(calibrated.dense.parameters * 0.8))
        again = revive(calibrated.dense, json.loads(json.dumps(facts_of(model))), tensors_of(model))
        assert torch.equal(logits(again), logits(model))
        assert parameters_of(again) == parameters_of(model) <= calibrated.dense.parameters * 0.8


# Learned masks.


def gates_of(dense, seed=0):
    gates = learnt_masks.Gates(dense.sites, dense.shapes, 0.0)
    with torch.no_grad():
        gates.log_odds.copy_(2 * torch.randn(gates.log_odds.shape, generator=torch.Generator().manual_seed(seed)))
    return gates


def test_gates_expected_share_matches_samples(dense):
    gates, generator = gates_of(dense), torch.Generator().manual_seed(1)
    with torch.no_grad():
        drawn = torch.stack([gates.sample(generator) for _ in range(4000)])
        torch.testing.assert_close((drawn > 0).float().mean(0), gates.open(), atol=0.03, rtol=0)
        shares = 1 - ((drawn > 0) * gates.costs).sum(1) / gates.costs.sum()
        assert gates.expected_share().item() == pytest.approx(shares.mean().item(), abs=2e-3)
    assert drawn.min() == 0
    assert drawn.max() == 1


def test_gates_match_cut_model(dense):
    gates = gates_of(dense)
    parameters = int(dense.parameters * 0.8)
    kept = gates.choose(parameters - dense.fixed_parameters)
    masked = build_model(dense.config, dense.sites, dense.weights, {})
    current, hooks = learnt_masks.gated(masked, gates)
    current.update(gates.by_site(gates.settled().detach() * kept))
    model = learnt_masks.cut(dense, dense.weights, gates, parameters)
    torch.testing.assert_close(logits(model), logits(masked), rtol=1e-4, atol=1e-4)
    assert gates.log_odds[kept].min() >= gates.log_odds[~kept].max() or (~kept).sum() == 0
    assert 0 <= parameters - parameters_of(model) < gates.costs.max()
    for hook in hooks:
        hook.remove()


def test_learnt_masks_meet_size_and_keep_important_units(dense, states):
    lines = []
    settings = learnt_masks.MaskSettings()
    target = int(dense.parameters * 0.7)
    before = {name: tensor.clone() for name, tensor in dense.weights.items()}
    model = learnt_masks.learn(dense, states, target, 40, Settings(), settings, 0, lines.append)
    assert 0 <= target - parameters_of(model) < 5000
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.weights.items())
    expected, wanted = (float(part) for part in lines[-1].split("expected to go ")[1].split(",")[0].split(" of "))
    assert expected == pytest.approx(wanted, abs=0.1)


# FLAP.


def test_flap_bias_is_mean_of_removed_output(calibrated):
    dense = calibrated.dense
    inputs = flap.inputs_of(calibrated)
    site = dense.sites[1]
    seen = []
    hook = dense.model.get_submodule(site.output).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        dense.model(calibrated.blocks_BT, use_cache=False)
    hook.remove()
    x_NI = torch.cat(seen).flatten(0, 1)
    torch.testing.assert_close(inputs[site.name].mean_I, x_NI.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inputs[site.name].variance_I, x_NI.var(0, correction=0), rtol=1e-3, atol=1e-5)
    kept = flap.choose(calibrated, flap.scores(calibrated, inputs), int(dense.parameters * 0.8))
    model = flap.compensated(calibrated, inputs, kept)
    module, whole = model.get_submodule(site.output), dense.model.get_submodule(site.output)
    columns = kept[site.name].nonzero().flatten()
    assert 0 < len(columns) < site.num_units
    with torch.no_grad():
        torch.testing.assert_close(module(x_NI[:, columns]).mean(0), whole(x_NI).mean(0), rtol=1e-3, atol=1e-4)


def test_flap_removes_least_fluctuating(calibrated):
    dense, inputs = calibrated.dense, flap.inputs_of(calibrated)
    scores = flap.scores(calibrated, inputs)
    kept = flap.choose(calibrated, scores, int(dense.parameters * 0.8))
    site = dense.sites[1]
    column_I = inputs[site.name].variance_I * dense.weights[site.output_tensor].pow(2).sum(0)
    order = column_I.argsort()
    assert kept[site.name][order].tolist() == sorted(kept[site.name].tolist())
    channels = [(scores[one.name][unit].item(), kept[one.name][unit].item()) for one in dense.sites
                if one.kind == "mlp" for unit in range(one.num_units)]  # fmt: skip
    assert [stays for _, stays in sorted(channels)] == sorted(stays for _, stays in channels)


# SliceGPT.


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_slicegpt_unsliced_is_dense_model(checkpoint, calibration, family):
    calibrated = Calibrated(load_dense(str(checkpoint(family)), "kv_group", torch.device("cpu")), calibration)
    model = slicegpt.sliced(calibrated.dense, slicegpt.axes(calibrated), calibrated.dense.config.hidden_size)
    torch.testing.assert_close(logits(model), logits(calibrated.dense.model), rtol=1e-3, atol=1e-3)


def test_slicegpt_parameter_count(calibrated):
    axes = slicegpt.axes(calibrated)
    for axis in axes:
        torch.testing.assert_close(axis.T @ axis, torch.eye(len(axis)), rtol=0, atol=1e-4)
    for size in (5, 30, 47):
        model = slicegpt.sliced(calibrated.dense, axes, size)
        assert parameters_of(model) == slicegpt.sliced_parameters(calibrated.dense, size)


def test_slicegpt_axes_are_principal_components(calibrated):
    dense = calibrated.dense
    first = slicegpt.axes(calibrated)[0]
    with torch.no_grad():
        x_ND = dense.model.model.embed_tokens(calibrated.blocks_BT).flatten(0, 1)
        x_ND = x_ND / x_ND.square().mean(-1, keepdim=True).add(1e-12).sqrt()
    powers = (x_ND @ first).square().sum(0)
    assert torch.equal(powers.argsort(descending=True, stable=True)[:10], torch.arange(10))
    singular = torch.linalg.svdvals(x_ND)[:10].square()
    torch.testing.assert_close(powers[:10], singular, rtol=1e-3, atol=1e-3)


def test_method_names_match_methods():
    assert efficiency_rows.NAMES.keys() == METHODS.keys() >= efficiency_rows.REIMPLEMENTED.keys()


# Plots and tables.


def curve(method, *points):
    return Curve(method, method, points)


def test_curve_interpolation():
    ours = curve("ours", (0, 4.0), (8, 2.0), (32, 1.0))
    rival = curve("even", (0, 5.0), (8, 3.0), (32, 2.0), (128, 1.5))
    assert ours.at(16) == pytest.approx(1.5)
    assert ours.at(4) == pytest.approx(3.0)
    assert ours.at(64) is None
    # Linear over the logarithm: 2.5 is halfway between 3 and 2.
    assert rival.reaches(2.5) == pytest.approx(16)
    assert rival.reaches(4.0) == pytest.approx(4)
    assert rival.reaches(1.4) is None
    assert str(need(rival, ours, 8)) == "4.0"
    assert str(need(rival, ours, 32)) == ">4.0"
    assert need(rival, ours, 64) is None
    # Training tokens before there is a model count.
    masks = curve("masks", (32, 1.0), (64, 0.5))
    assert str(need(masks, ours, 8)) == "4.0"
    better = curve("even", (0, 1.9), (8, 0.5))
    assert need(better, ours, 8).times == 0
    assert chosen_point(ours, [rival]) == 8
    assert chosen_point(ours, [masks]) == 32
    assert chosen_point(ours, []) is None


def test_curves_average_seeds():
    def row(seed, values, text=0):
        points = [{"tokens": tokens, "kl_wikitext": value} for tokens, value in values.items()]
        return {
            "method": "ours",
            "name": "ours",
            "seed": seed,
            "points": points,
            "text": {"calibration": text, "masks": 9},
        }

    rows = [row(0, {0: 2.0, 8: 1.0, 16: 0.5}, text=100), row(1, {0: 4.0, 8: 2.0}, text=100)]
    assert curves(rows, "kl_wikitext")[0].points == ((0, 3.0), (8, 1.5))
    assert curves(rows, "kl_wikitext", all_text=True)[0].points == ((100, 3.0), (108, 1.5))
    assert curves(rows, "zero_shot") == []


def test_report_plots_and_tables(finished, tmp_path, capsys):
    folder, rows, _ = finished
    label = rows["ours"]["model"]
    options = ["--results", str(folder / "results"), "--model", label, "--target", "0.7"]
    efficiency_rows.main("", ["plot", "--images", str(tmp_path), *options])
    for name in ("data-efficiency.svg", "data-needed.svg"):
        drawn = ElementTree.parse(tmp_path / name)
        words = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
        for row in rows.values():
            assert any(row["name"] in word for word in words)
        assert "prefers-color-scheme:dark" in (tmp_path / name).read_text()
    capsys.readouterr()
    efficiency_rows.main("", ["table", *options])
    table = capsys.readouterr().out
    last = rows["even"]["points"][-1]
    assert f" {last['kl_wikitext']:.3f} |" in table
    assert f" {last['kl_held_out']:.3f} |" in table
    assert table.count("| even widths, our solver |") == 5
    assert "Times the training tokens of ours" in table


def test_labels_do_not_overlap():
    assert apart([10, 12, 40], 10, 0, 100) == [10, 20, 40]
    assert apart([40, 98, 99], 10, 0, 100) == [40, 90, 100]
    assert apart([5, 1], 10, 0, 100) == [11, 1]
