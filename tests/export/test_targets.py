"""Tests of `export.targets`: early refusals, plans that the engines can run, files at the end of a run."""

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
from gguf import GGUFReader
from helpers import SETTINGS, TARGET, files_of, make_checkpoint, make_config, save_pruned
from transformers import AutoConfig, AutoModelForCausalLM

from darwinlm import UserError
from darwinlm.cli import exit_code
from darwinlm.config.loading import make_recipe
from darwinlm.config.recipe import Target
from darwinlm.database.levels import level_sizes
from darwinlm.database.store import Database
from darwinlm.export.targets import ENGINES, TARGETS, sites_kept_for
from darwinlm.models import modeling_darwinlm
from darwinlm.models.sites import find_sites
from darwinlm.pipeline import prune
from darwinlm.plan import Plan, parameter_budget
from darwinlm.search.allocation import cheapest_plan, even_plans
from darwinlm.search.sensitivity import measure_sensitivity


def test_target_names_match_engines():
    assert get_args(Target) == TARGETS
    assert [engine.name for engine in ENGINES.values()] == [*ENGINES] == [*TARGETS, "hf"]


BROKEN = "raise RuntimeError('the code of an earlier version')\n"
CODE = "modeling_darwinlm.py"


def test_export_hf_renews_code_of_run(run, tmp_path, caplog, capsys):
    finished, settings = run
    copied = shutil.copytree(finished.path, tmp_path / "run")
    code, before = copied / "model" / CODE, files_of(copied)
    code.write_text(BROKEN)
    config = json.loads((copied / "model" / "config.json").read_text())
    auto_map = dict(config["auto_map"])
    del config["auto_map"]["AutoModelForSequenceClassification"]
    (copied / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="an earlier version"):
        AutoModelForCausalLM.from_pretrained(copied / "model", trust_remote_code=True)
    assert exit_code(["export", str(copied), "--to", "hf"]) == 0
    assert "verified: largest logit difference" in capsys.readouterr().out
    assert code.read_bytes() == Path(modeling_darwinlm.__file__).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(copied / "model", trust_remote_code=True).num_parameters() > 0
    assert json.loads((copied / "model" / "config.json").read_text())["auto_map"] == auto_map
    # The same command has nothing to do, and nothing else has changed.
    model = json.loads((copied / "manifest.json").read_text())["recipe"]["model"]
    caplog.clear()
    prune(model, target=TARGET, out=copied, settings=settings)
    assert not [message for message in caplog.messages if "recreating" in message or "damaged" in message]
    after = files_of(copied)
    assert {name for name in {*before, *after} if before.get(name) != after.get(name)} <= {"model/config.json"}


def test_export_hf_renews_code_of_folder(tmp_path, capsys):
    config = make_config("llama")
    config.per_layer_config = {1: {"skip": ["mlp"]}}
    save_pruned(config, tmp_path / "model")
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / CODE).write_text(BROKEN)
    assert exit_code(["export", str(tmp_path / "model"), "--to", "hf", "--out", str(tmp_path / "new")]) == 0
    assert (tmp_path / "model" / CODE).read_text() == BROKEN
    assert (tmp_path / "new" / CODE).read_text() != BROKEN
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == weights
    (tmp_path / "model" / CODE).unlink()
    assert exit_code(["export", str(tmp_path / "model"), "--to", "hf"]) == 2
    assert f"model contains no {CODE} to update" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"export": {"targets": ["vllm"]}, "database": {"granularity": "query_head"}}, "only transformers can run"),
        (
            {"export": {"targets": ["hf-native"]}, "search": {"uniform": False}},
            r"needs the same sizes in all layers; remove search\.uniform=false",
        ),
        ({"export": {"targets": ["openvino"]}}, r"export\.targets\.0 = 'openvino'"),
        ({"export": {"targets": "gguf"}}, "expected a list"),
        (
            {"export": {"tensor_parallel": 2}, "database": {"granularity": "query_head"}},
            r"export\.tensor_parallel=2 with database\.granularity=query_head",
        ),
    ],
)
def test_export_invalid_recipe_refused(settings, match):
    with pytest.raises(UserError, match=match):
        make_recipe({"model": "m", "target": 0.5} | settings)


def test_unsupported_engine_refused_before_run(tmp_path, text):
    folder = make_checkpoint("qwen3", tmp_path / "dense")
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    settings = SETTINGS | {"data.source": str(text), "export.targets": ["vllm", "gguf"]}
    with pytest.raises(UserError, match=r"llama\.cpp cannot run a qwen3 model with an untied head"):
        prune(folder, target=0.7, out=tmp_path / "run", settings=settings)
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


def test_plans_keep_required_sites(pruned):
    dense, database = pruned("llama", "kv_group")
    whole = database.space(dense.sites)
    kept = Database(database.folder, kept=sites_kept_for(["gguf"])).space(dense.sites)
    assert kept.sites[0].name == "layers.0.attention" and min(kept.sites[0].units) == 1
    assert kept.sites[0].parameters == whole.sites[0].parameters[:-1]
    assert kept.sites[1:] == whole.sites[1:]
    assert sites_kept_for(["vllm", "hf-native"]) == set()
    # The site is kept even if it is the cheapest to remove.
    plan = cheapest_plan(
        kept, parameter_budget(0.8, kept), lambda site, level: -level * (site.name == kept.sites[0].name)
    )
    assert plan.levels[0] == len(whole.sites[0].units) - 2


def test_sensitivities_with_kept_sites(pruned, calibration):
    dense, database = pruned("llama", "kv_group")
    kept = Database(database.folder, kept={"layers.0.attention", "layers.1.mlp"})
    base = Plan(levels=(1, 0, 1, 1, 0, 1))
    whole, fewer = (
        measure_sensitivity(
            dense,
            lambda index, level: database.cut(dense.sites[index], level, dense.device),
            one.space(dense.sites),
            base,
            calibration[:2],
            seed=0,
            after_block=lambda: None,
        )
        for one in (database, kept)
    )
    for index, (before, after) in enumerate(zip(whole.first, fewer.first, strict=True)):
        assert after == pytest.approx(before[: len(after)], rel=1e-4, abs=1e-7)
        assert len(after) == len(before) - (index in (0, 3))


def test_indivisible_tensor_parallel_refused_before_run(tmp_path, checkpoint, text):
    for parallel, told in (
        (3, "does not divide the 2 KV heads of the model's layers; choose one of 1, 2"),
        (128, "2 KV heads"),
    ):
        settings = SETTINGS | {"data.source": str(text), "export.tensor_parallel": parallel}
        with pytest.raises(UserError, match=told):
            prune(checkpoint("llama"), target=0.7, out=tmp_path / "run", settings=settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kv_heads", "width"), [(8, 64), (2, 22), (6, 1536), (4, 11008)])
@pytest.mark.parametrize("parallel", [1, 2])
def test_level_sizes_divisible_by_tensor_parallel(kv_heads, width, parallel):
    config = make_config("mistral", num_attention_heads=3 * kv_heads, num_key_value_heads=kv_heads)
    config.intermediate_size = width
    attention, mlp = find_sites(config, "kv_group")[:2]
    for site in (attention, mlp):
        sizes = level_sizes(site, 10, parallel)
        assert all(size % parallel == 0 for size in sizes)
        assert sizes[0] == site.num_units and sizes[-1] == 0 and list(sizes) == sorted(set(sizes), reverse=True)
        assert len(sizes) == min(11, site.num_units // parallel + 1)


@pytest.mark.slow
def test_run_with_tensor_parallel(checkpoint, text, tmp_path):
    settings = SETTINGS | {"data.source": str(text), "export.tensor_parallel": 2, "export.targets": ["vllm"]}
    run = prune(checkpoint("qwen2"), target=0.6, out=tmp_path / "run", settings=settings)
    sizes = json.loads((run.model_path / "plan.json").read_text())["units"].values()
    assert all(size % 2 == 0 for size in sizes)
    facts = json.loads((tmp_path / "run" / "model-vllm" / "export.json").read_text())
    assert facts["tensor_parallel"] == 2


@pytest.mark.slow
def test_run_exports_targets(checkpoint, text, tmp_path):
    settings = SETTINGS | {"data.source": str(text), "export.targets": ["gguf", "vllm"]}
    run = prune(checkpoint("llama"), target=0.55, out=tmp_path / "run", settings=settings)
    file = tmp_path / "run" / "model-f32.gguf"
    plan = json.loads((run.model_path / "plan.json").read_text())
    assert plan["units"]["layers.0.attention"] > 0
    layers = {name.split(".")[1] for name, units in plan["units"].items() if units}
    assert GGUFReader(file).get_field("deci.block_count").contents() == len(layers)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    for target in ("gguf", "vllm"):
        assert "largest logit difference" in manifest["stages"][target]["proof"]
    assert (tmp_path / "run" / "model-vllm" / "export.json").exists()
    # The same command again writes nothing.
    before = file.stat().st_mtime_ns
    prune(checkpoint("llama"), target=0.55, out=tmp_path / "run", settings=settings)
    assert file.stat().st_mtime_ns == before


def test_even_plans_with_kept_site(pruned):
    dense, database = pruned("qwen3", "kv_group")
    spaces = [one.space(dense.sites) for one in (database, Database(database.folder, kept={"layers.0.attention"}))]
    for target in (0.9, 0.8):
        found = [even_plans(space, parameter_budget(target, space)) for space in spaces]
        assert found[0] == found[1] != []
