"""Tests of pruning pruned models, separately and in the steps of a gradual run."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import (
    FAMILIES,
    GRANULARITIES,
    SETTINGS,
    VOCABULARY,
    files_of,
    make_tokenizer,
    mask,
    native_model,
    uneven_plan,
)
from safetensors.torch import load_file

import darwinlm
from darwinlm.cli import exit_code
from darwinlm.commands.inspect import inspect
from darwinlm.commands.recover import recover_again
from darwinlm.config.loading import load_recipe
from darwinlm.config.recipe import DatabaseRecipe, DataRecipe, SearchRecipe, WorkloadRecipe
from darwinlm.data.corpus import Corpus, TextStream, load_corpus
from darwinlm.data.tokens import Tokens
from darwinlm.database.build import build_database
from darwinlm.errors import UserError
from darwinlm.export.hf import export_hf
from darwinlm.export.targets import export_model
from darwinlm.models.config import load_sizes
from darwinlm.models.cutting import Cut, build_model, count_parameters, kv_elements, sizes_by_layer
from darwinlm.models.loading import load_dense
from darwinlm.models.modeling_darwinlm import whole_settings
from darwinlm.models.walking import CACHE
from darwinlm.pipeline import prune
from darwinlm.plan import Limit, Plan, make_budget
from darwinlm.recovery.refit import refit
from darwinlm.recovery.samples import Blocks
from darwinlm.run.directory import run_steps
from darwinlm.search.budgets import measure_latencies
from darwinlm.search.trials import TrialScorer

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
CASES = [(family, granularity) for family in FAMILIES for granularity in GRANULARITIES]


@pytest.fixture(scope="module")
def twice(pruned, calibration, tmp_path_factory):
    """Return a function that gives the cuts of an uneven model (the first layer lacks attention, the second its MLP),
    the model loaded from its folder, and a database of it."""
    known = {}

    def get(family, granularity):
        if (family, granularity) not in known:
            dense, database = pruned(family, granularity)
            plan = uneven_plan(database.space(dense.sites), granularity)
            cuts = database.cuts(dense.sites, plan, CPU)
            folder = tmp_path_factory.mktemp("twice") / "model"
            model = build_model(dense.config, dense.sites, dense.weights, cuts)
            export_hf(model, dense, {"levels": plan}, "# card\n", folder)
            again = load_dense(str(folder), granularity, CPU, cut_from=dense)
            recipe = DatabaseRecipe(levels=4, batch_size=3)
            known[family, granularity] = cuts, again, build_database(again, calibration, recipe, folder.parent / "db")
        return known[family, granularity]

    return get


def composed(first, cut):
    """Compose two consecutive cuts of a site."""
    return Cut(tuple(first.kept[unit] for unit in cut.kept), cut.output_weight)


@pytest.mark.parametrize(("family", "granularity"), CASES)
def test_model_cut_twice_matches_masked_model(family, granularity, twice, pruned, checkpoint, tmp_path):
    first, again, database = twice(family, granularity)
    dense, _ = pruned(family, granularity)
    space = database.space(again.sites)
    names = {site.name for site in again.sites}
    assert {site.name for site in dense.sites} - names == {"layers.0.attention", "layers.1.mlp"}
    for depth in range(max(len(site.units) for site in space.sites)):
        plan = [min(len(s.units) - 1, max(0, depth - i % 2)) for i, s in enumerate(space.sites)]
        cuts = database.cuts(again.sites, plan, CPU)
        native = native_model(checkpoint(family))
        for site in dense.sites:
            cut = composed(first[site.name], cuts[site.name]) if site.name in cuts else first[site.name]
            mask(native, site, cut, dense.weights[f"{site.output}.weight"])
        model = build_model(again.config, again.sites, again.weights, cuts)
        with torch.no_grad():
            assert torch.allclose(model(TOKENS).logits, native(TOKENS).logits, atol=1e-4), plan
        assert sum(p.numel() for p in model.parameters()) == space.parameters(plan)
    assert space.dense_parameters == dense.parameters
    export_hf(model, again, {}, "# card\n", tmp_path / "model")
    with torch.no_grad():
        assert torch.allclose(darwinlm.load(tmp_path / "model")(TOKENS).logits, model(TOKENS).logits, atol=1e-4)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sizes_of_second_cut(granularity, twice):
    _, again, database = twice("qwen3", granularity)
    for site in again.sites:
        for level in range(1, len(database.space([site]).sites[0].units)):
            cut = database.cut(site, level, CPU)
            model = build_model(again.config, again.sites, again.weights, {site.name: cut})
            gone = again.parameters - sum(p.numel() for p in model.parameters())
            whole = count_parameters(site, again.shapes, range(site.num_units))
            assert gone == whole - count_parameters(site, again.shapes, cut.kept)
            if site.kind == "attention":
                layers = model(TOKENS, use_cache=True)[CACHE].layers
                skipped = [model.config.skipped(layer) for layer in range(model.config.num_hidden_layers)]
                assert len(layers) == sum("attention" not in parts for parts in skipped)
                keys = layers[model.model.layers[site.layer].self_attn.layer_idx].keys if cut.kept else None
                stored = 0 if keys is None else 2 * keys.shape[1] * keys.shape[3]
                assert stored == kv_elements(site, cut.kept, again.config.head_dim)


def test_removed_part_leaves_no_sizes(twice):
    _, again, _ = twice("qwen2", "query_head")
    cuts = {site.name: Cut((), None) for site in again.sites}
    model = build_model(again.config, again.sites, again.weights, cuts)
    assert set(map(str, sizes_by_layer(model.config).values())) == {"{'skip': ['attention', 'mlp']}"}


def test_scores_against_dense_model(twice, pruned):
    _, again, database = twice("llama", "kv_group")
    dense, _ = pruned("llama", "kv_group")
    corpus = Corpus(dict.fromkeys(("validation", "train"), Tokens.unmasked(TOKENS.int())))
    recipe = SearchRecipe(trial_tokens=(0,), score_tokens=(TOKENS.numel(),), survivors=(1,), learning_rate=1e-9)
    whole = Plan(levels=(0,) * len(again.sites))
    with torch.no_grad():
        log_p, log_q = (model(TOKENS).logits.log_softmax(-1) for model in (dense.model, again.model))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    scorer = TrialScorer(again, database, corpus, recipe)
    assert expected > 0.01
    assert scorer.score(whole, 0, whole).kl == pytest.approx(expected, rel=1e-3)
    assert scorer.score_after(whole, 24, TOKENS.numel()).kl == pytest.approx(expected, rel=1e-3)


def test_refit_reference_with_missing_parts(twice):
    _, again, _ = twice("qwen3", "kv_group")
    model = build_model(again.config, again.sites, again.weights, {})
    refit(model, again.model, TOKENS)
    for one, other in zip(model.parameters(), again.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_measure_latencies_of_pruned_model(twice):
    _, again, database = twice("qwen2", "query_head")
    space = database.space(again.sites)
    table = measure_latencies(again, space, WorkloadRecipe(prompt_tokens=4, new_tokens=2))
    for kind in ("attention", "mlp"):
        sizes = {str(units) for site in space.sites if site.kind == kind for units in site.units} - {"0"}
        assert set(table[kind]) == sizes


def test_uneven_kv_groups_refused(twice):
    _, again, database = twice("llama", "query_head")
    space = database.space(again.sites)
    uneven = next(
        cut
        for index, site in enumerate(again.sites)
        for level in range(1, len(space.sites[index].units) - 1)
        if site.kind == "attention"
        and (cut := build_model(again.config, again.sites, again.weights, {site.name: database.cut(site, level, CPU)}))
        and any(layer.get("query_heads_per_kv_head") for layer in sizes_by_layer(cut.config).values())
    )
    with pytest.raises(UserError, match=r"KV heads that serve .* set database\.granularity=query_head"):
        darwinlm.models.sites.find_sites(uneven.config, "kv_group")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5, "num_key_value_heads": 2}, "2 KV heads cannot serve 5 query heads"),
        ({"query_heads_per_kv_head": [4]}, "cannot serve"),
        ({"query_heads_per_kv_head": ["a"]}, "no model can be built"),
        ({"intermediate_size": 5}, "has shape"),
        ({"skip": 3}, "its config.json cannot be used"),
        (None, "has no attention or MLP left to prune"),
    ],
)
def test_invalid_pruned_config(change, message, twice, tmp_path):
    _, again, _ = twice("qwen2", "kv_group")
    folder = shutil.copytree(again.source, tmp_path / "model")
    config = whole_settings(json.loads((folder / "config.json").read_text()))
    if change is None:
        config["per_layer_config"] = {str(layer): {"skip": ["attention", "mlp"]} for layer in range(3)}
    else:
        config["per_layer_config"]["2"] = {**config["per_layer_config"].get("2", {}), **change}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        load_dense(str(folder), "kv_group", CPU)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_code_of_pruned_model_not_run(twice, tmp_path):
    _, again, _ = twice("llama", "kv_group")
    folder = shutil.copytree(again.source, tmp_path / "model")
    (folder / "modeling_darwinlm.py").write_text("raise SystemExit('code of the model was run')\n")
    loaded = load_dense(str(folder), "kv_group", CPU)
    with torch.no_grad():
        assert torch.equal(loaded.model(TOKENS).logits, again.model(TOKENS).logits)
    export_hf(loaded.model, loaded, {}, "# card\n", tmp_path / "again")
    assert "SystemExit" not in (tmp_path / "again" / "modeling_darwinlm.py").read_text()


# ---- the steps of a run


def limit(dense, fixed, reference=None):
    return Limit(
        name="params", unit="parameters", fixed=fixed, costs=((dense - fixed, 0),), maximum=0, reference=reference
    )


def test_steps_remove_equal_shares():
    sizes = [
        make_budget({"params": 0.46}, {"params": limit(1000, 100)}, part / 3).limits[0].maximum for part in (1, 2, 3)
    ]
    assert sizes[-1] == 460
    shares = [(after - 100) / (before - 100) for before, after in zip([1000, *sizes], sizes, strict=False)]
    assert shares == pytest.approx([shares[0]] * 3, rel=5e-3)
    # A later step cuts a smaller model, but its fractions refer to the first.
    later = make_budget({"params": 0.46}, {"params": limit(700, 100, reference=1000)}).limits[0]
    assert (later.maximum, later.dense, later.uncut) == (460, 1000, 700)


def test_steps_continue_training_text(tmp_path):
    blocks = Tokens.unmasked(torch.arange(10).view(5, 2))
    whole = Blocks(blocks, 12, 3, 0, False)
    parts = [*Blocks(blocks, 7, 3, 0, False), *Blocks(blocks, 5, 3, 7, False)]
    assert [sample["input_ids"].tolist() for sample in whole] == [part["input_ids"].tolist() for part in parts]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * 9}) + "\n" for n in range(200)))
    recipe, tokenizer = DataRecipe(source=str(tmp_path / "text.jsonl"), sequence_length=24), make_tokenizer()
    stream = TextStream(recipe, tokenizer, 0, frozenset()).blocks()
    read = [next(stream) for _ in range(9)]
    state = {**read[3][1], "tokens": read[3][1]["tokens"].to_json()}
    rest = TextStream(recipe, tokenizer, 0, frozenset(), begin=state).blocks()
    assert all(next(rest)[0].to_json() == block.to_json() for block, _ in read[4:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps = 0: input should be greater than or equal to 1"),
        (
            {"steps": 2, "target": "0.8,0.6"},
            "steps=2 with target '0.8,0.6': the sizes of a family come from one database",
        ),
        ({"steps": 2, "target": "params=0.5,latency=0.5"}, "steps=2 with a latency limit"),
    ],
)
def test_invalid_steps_refused(settings, message):
    with pytest.raises(UserError, match=message):
        load_recipe("quick", {"model": "m", "target": 0.5, **settings})


GRADUAL = {**SETTINGS, "steps": 2, "recovery.tokens": 96}
SIZE = 0.45


class Crash(BaseException):
    """Simulated crash; not an Exception, so that nothing catches it."""


def crash_at(monkeypatch, wanted):
    """Crash at the first file for which `wanted` is true."""
    replace = os.replace

    def replace_or_crash(source, destination):
        if wanted(str(destination)):
            raise Crash
        replace(source, destination)

    monkeypatch.setattr(os, "replace", replace_or_crash)


@pytest.fixture(scope="module")
def gradual(checkpoint, text, tmp_path_factory):
    """Finished gradual run, its settings, and copies from its first step and from the start of its second."""
    root = tmp_path_factory.mktemp("gradual")
    settings = {**GRADUAL, "data.source": str(text), "export.targets": ["gguf", "vllm"]}
    places, replace = {"step-1/search/state.json": root / "early", "run/database": root / "begun"}, os.replace

    def copy_before(source, destination):
        for place, copied in places.items():
            if place in str(destination) and not copied.exists():
                shutil.copytree(root / "run", copied)
                (copied / "lock").unlink()
        replace(source, destination)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", copy_before)
        run = prune(checkpoint("llama"), target=SIZE, out=root / "run", settings=settings)
    return run, settings, root / "begun"


def units_of(folder):
    return json.loads((folder / "plan.json").read_text())["units"]


def test_gradual_run_meets_target(gradual):
    run, _, _ = gradual
    rows = {row["name"]: row for row in run.metrics["rows"]}
    assert list(rows) == ["dense", "uniform", "step 1", "found", "recovered"]
    dense = rows["dense"]["parameters"]
    assert rows["recovered"]["parameters"] == rows["found"]["parameters"] <= SIZE * dense < rows["step 1"]["parameters"]
    assert rows["uniform"]["parameters"] <= SIZE * dense
    plans = [json.loads((path / "model" / "plan.json").read_text()) for path in (run.path / "step-1", run.path)]
    assert [plan["dense_parameters"] for plan in plans] == [dense, dense]
    assert [plan["parameters"] for plan in plans] == [rows["step 1"]["parameters"], rows["found"]["parameters"]]
    earlier, later = (units_of(path / "model") for path in (run.path / "step-1", run.path))
    gone = {name for name, units in earlier.items() if units == 0}
    assert set(later) == set(earlier) - gone
    assert all(later[name] <= earlier[name] for name in later)
    names = load_file(run.model_path / "model.safetensors")
    for name in gone:
        part = {"attention": "self_attn", "mlp": "mlp"}[name.split(".")[2]]
        assert not any(f"layers.{name.split('.')[1]}.{part}" in tensor for tensor in names)
    (budget,) = run.metrics["limits"]
    assert (budget["dense"], budget["found"]) == (dense, rows["found"]["parameters"])


def test_gradual_run_evaluated_and_exported(gradual, checkpoint, tmp_path):
    run, _, _ = gradual
    test = load_corpus(run.path / "corpus.safetensors").splits["test"].input_ids_BT.long()
    with torch.no_grad():
        models = native_model(checkpoint("llama")), run.load()
        log_p, log_q = (model(test).logits.log_softmax(-1) for model in models)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert run.metrics["rows"][-1]["kl"] == pytest.approx(kl, rel=1e-3)
    stages = run.metrics["stages"]
    assert stages["gguf"]["proof"] and stages["vllm"]["proof"]
    assert units_of(run.model_path)["layers.0.attention"] > 0
    assert export_model(run.path / "step-1", "vllm", tmp_path / "vllm").proof is not None


def test_gradual_run_splits_training_over_steps(gradual):
    run, _, begun = gradual
    losses = [json.loads((path / "recovery" / "losses.json").read_text()) for path in (run.path / "step-1", run.path)]
    # First 48 of 96 tokens, in batches of 2 * 16: 2 steps; then the rest.
    assert [len(one["loss"]) for one in losses] == [2, 1]
    stages = [f"step 1: {name}" for name in ("database", "search", "recovery", "export")]
    stages += ["database", "search", "recovery", "evaluation", "export", "gguf", "vllm"]
    assert list(run.metrics["stages"]) == ["corpus", *stages]
    assert run.metrics["finished"]
    for row in run.metrics["layers"]:
        assert {"attention", "mlp"} <= set(row)
    assert run.metrics["share"] <= SIZE
    assert "step 1" in (run.path / "report" / "index.html").read_text()
    unfinished = darwinlm.report.facts.collect(begun)
    assert unfinished["pending"] == ["database", "search", "recovery", "evaluation", "export"]
    assert SIZE < unfinished["share"] < 1


def test_inspect_of_gradual_run(gradual, tmp_path, capsys):
    run, _, begun = gradual
    assert exit_code(["inspect", str(run.path)]) == 0
    of_run = capsys.readouterr().out
    assert exit_code(["inspect", str(run.model_path)]) == 0
    assert of_run.splitlines()[1:-1] == capsys.readouterr().out.splitlines()[1:]
    copied = shutil.copytree(run.path, tmp_path / "run")
    shutil.rmtree(copied / "model")
    (planned,), (written,) = inspect(str(copied)), inspect(str(run.path))
    for one, other in zip(planned["layers"], written["layers"], strict=True):
        assert one["mlp"] == other["mlp"]
        assert one["attention"]["parameters"] == other["attention"]["parameters"]
        assert one["attention"]["dense_parameters"] == other["attention"]["dense_parameters"]
    assert exit_code(["inspect", str(copied)]) == 0
    assert of_run.splitlines()[-2] == capsys.readouterr().out.splitlines()[-2]
    assert inspect(str(begun))[0]["parameters"] > written["parameters"]


@pytest.mark.parametrize(
    "place",
    ["step 1", "nothing", "run/database/index.json", "run/search/state.json", "run/recovery/weights", "run/model"],
)
def test_gradual_run_resumes_to_same_files(place, gradual, checkpoint, tmp_path, monkeypatch):
    finished, settings, begun = gradual
    shutil.copytree(begun.with_name("early") if place == "step 1" else begun, tmp_path / "run")
    if place.startswith("run/"):
        with monkeypatch.context() as patch:
            crash_at(patch, lambda path: place in path)
            with pytest.raises(Crash):
                prune(checkpoint("llama"), target=SIZE, out=tmp_path / "run", settings=settings)
    elif place == "nothing":
        # A damaged file of an earlier step is recreated.
        file = tmp_path / "run" / "step-1" / "model" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    prune(checkpoint("llama"), target=SIZE, out=tmp_path / "run", settings=settings)
    assert files_of(tmp_path / "run") == files_of(finished.path)


def test_recover_again_trains_last_step(gradual, tmp_path):
    finished, _, _ = gradual
    shutil.copytree(finished.path, tmp_path / "run")
    recover_again(tmp_path / "run", {"recovery.tokens": "0.192K"})
    before, after = files_of(finished.path), files_of(tmp_path / "run")
    assert not any(name.startswith("step-1") for name in before if before[name] != after.get(name))
    # The first step has used 64 of 192 tokens.
    assert len(json.loads((tmp_path / "run" / "recovery" / "losses.json").read_text())["loss"]) == 4


def test_prune_model_of_a_step(gradual, text, tmp_path):
    run, _, _ = gradual
    source = run.path / "step-1" / "model"
    settings = {**SETTINGS, "data.source": str(text), "recovery.tokens": 0, "search.generations": 1}
    again = prune(source, target=0.8, out=tmp_path / "run", settings=settings)
    rows = {row["name"]: row for row in again.metrics["rows"]}
    given = sum(parameter.numel() for parameter in darwinlm.load(source).parameters())
    assert rows["dense"]["parameters"] == given and rows["found"]["parameters"] <= 0.8 * given
    layers = load_sizes(str(source)).num_hidden_layers
    assert [row["layer"] for row in again.metrics["layers"]] == list(range(layers))
    (entry,), (of_model,) = inspect(str(tmp_path / "run")), inspect(str(tmp_path / "run" / "model"))
    assert entry["layers"] == of_model["layers"]
    for layer, sizes in zip(again.metrics["layers"], of_model["layers"], strict=True):
        assert layer["mlp"] == sizes["mlp"]
    with pytest.raises(UserError, match=r"its layers already differ in size, so search\.uniform=true cannot"):
        prune(source, target=0.8, out=tmp_path / "other", settings={**settings, "search.uniform": True})


def test_gradual_run_of_two_ranks(gradual, checkpoint, text, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "darwinlm"]
    command += ["prune", str(checkpoint("qwen3")), "--target", "0.5", "--out", str(tmp_path / "run"), "--quiet"]
    settings = {**GRADUAL, "data.source": str(text), "database.granularity": "query_head", "recovery.text": "stream"}
    steps = settings.pop("steps")
    for key, value in {**settings, "search.generations": 1, "recovery.sharding": "fsdp"}.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    done = subprocess.run([*command, "--steps", str(steps)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
    dense, *_, last = metrics["rows"]
    assert last["parameters"] <= 0.5 * dense["parameters"]
    assert (tmp_path / "run" / "step-1" / "recovery" / "text.json").exists()
    first, _ = run_steps(load_recipe("quick", {"model": "m", "target": 0.5, "steps": 2}), tmp_path / "run")
    assert units_of(first.folder / "model").keys() >= units_of(tmp_path / "run" / "model").keys()


def test_plan_command_lists_steps(checkpoint, capsys):
    command = ["plan", str(checkpoint("llama")), "--target", "0.6", "--gpu", "h100", "--set", "data.sequence_length=64"]
    assert exit_code([*command, "--steps", "2"]) == 0
    gradual = " ".join(capsys.readouterr().out.split())
    assert exit_code(command) == 0
    at_once = " ".join(capsys.readouterr().out.split())
    for stage in ("database", "search", "recovery"):
        assert f"step 1: {stage}" in gradual and f"step 1: {stage}" not in at_once
    assert "step 1: evaluation" not in gradual and "evaluation" in gradual


def test_plan_run_of_pruned_model(gradual):
    run, _, _ = gradual
    whole, left = run.metrics["rows"][0]["parameters"], run.metrics["rows"][-1]["parameters"]
    from darwinlm.commands.plan import plan_run

    def costs(model):
        return plan_run(
            load_recipe("quick", {"model": str(model), "target": 0.9, "data.sequence_length": 64}), gpu="h100"
        )[1]

    dense, small = costs(load_recipe(run.path / "recipe.yaml", {}).model), costs(run.model_path)
    assert (dense.dense_parameters, small.dense_parameters) == (whole, left)
    assert all(one.seconds < other.seconds for one, other in zip(small.stages, dense.stages, strict=True))
