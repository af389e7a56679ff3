"""Tests of `darwinlm inspect`: the sizes shown are those of the model, for every kind of path."""

import json
import shutil

import pytest
from helpers import FAMILIES, GRANULARITIES

from darwinlm import cli
from darwinlm.commands.inspect import inspect
from darwinlm.errors import UserError
from darwinlm.models.config import load_sizes
from darwinlm.models.cutting import build_model
from darwinlm.plan import Plan
from darwinlm.report.facts import layers
from darwinlm.report.layers import model_sizes


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_model_sizes_match_model_and_plan(family, granularity, pruned, tmp_path):
    dense, database = pruned(family, granularity)
    space = database.space(dense.sites)
    last = [len(site.units) - 1 for site in space.sites]
    levels = [0, 1, last[2], min(2, last[3]), 1, last[5]]
    model = build_model(dense.config, dense.sites, dense.weights, database.cuts(dense.sites, levels, dense.device))
    model.config.save_pretrained(tmp_path)
    (entry,) = inspect(str(tmp_path))
    assert entry["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert entry["dense_parameters"] == dense.parameters
    heads = {"kv_group": dense.config.num_attention_heads // dense.config.num_key_value_heads, "query_head": 1}
    for found, planned in zip(entry["layers"], layers(space, Plan(levels=tuple(levels))), strict=True):
        assert found["mlp"] == planned["mlp"]
        planned["attention"]["kept"] *= heads[granularity]
        planned["attention"]["dense"] *= heads[granularity]
        assert found["attention"] == planned["attention"]


def test_model_sizes_of_dense_model(checkpoint):
    sizes = model_sizes(load_sizes(str(checkpoint("mistral"))))
    assert sizes["parameters"] == sizes["dense_parameters"]
    assert all(layer[kind]["share"] == 1 for layer in sizes["layers"] for kind in ("attention", "mlp"))


def test_inspect_run_and_unfinished_run(run, tmp_path, capsys):
    finished, _ = run
    assert cli.exit_code(["inspect", str(finished.path)]) == 0
    of_run = capsys.readouterr().out
    assert cli.exit_code(["inspect", str(finished.model_path)]) == 0
    of_model = capsys.readouterr().out
    assert of_run.splitlines()[1:-1] == of_model.splitlines()[1:]
    assert of_run.splitlines()[-1].startswith(f"limit on params: {finished.metrics['parameters']:,} of ")

    copied = shutil.copytree(finished.path, tmp_path / "run")
    shutil.rmtree(copied / "model")
    (entry,) = inspect(str(copied))
    assert "best plan so far" in entry["title"]
    assert entry["layers"] == finished.metrics["layers"]
    assert cli.exit_code(["inspect", str(copied)]) == 0
    assert "attention (KV groups)" in capsys.readouterr().out
    shutil.rmtree(copied / "search")
    with pytest.raises(UserError, match=r"has no plan for 0\.7 yet"):
        inspect(str(copied))


def test_inspect_needs_no_weights(tmp_path):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128_256}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **heads}))
    (entry,) = inspect(str(tmp_path))
    assert entry["parameters"] == 70_553_706_496  # as published for Llama 3 70B
    assert len(entry["layers"]) == 80


@pytest.mark.parametrize(
    "content", ["{}", "[1]", "{", '{"model_type": "bert"}', '{"model_type": "darwinlm", "rope_parameters": 3}']
)
def test_inspect_folder_without_model(content, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    code = cli.exit_code(["inspect", str(tmp_path)])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and len(error.splitlines()) == 1


def test_inspect_invalid_pruned_config(run, tmp_path):
    config = json.loads((run[0].model_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": "three"}))
    with pytest.raises(UserError, match="cannot be used"):
        inspect(str(tmp_path))
