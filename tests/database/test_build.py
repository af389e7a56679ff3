"""Tests of the database stage: streamed, distributed over ranks, offloaded and resumed, it gives the same database."""

import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from helpers import VOCABULARY
from safetensors.torch import load_file
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from darwinlm.config.recipe import DatabaseRecipe
from darwinlm.database import build
from darwinlm.database.activations import choose_place, open_activations
from darwinlm.database.build import build_database
from darwinlm.database.grams import walk_blocks
from darwinlm.database.store import Database
from darwinlm.errors import InvalidTensorError, UserError
from darwinlm.models.cutting import Cut
from darwinlm.models.loading import load_dense
from darwinlm.runtime.progress import Phases

CPU = torch.device("cpu")
RECIPE = DatabaseRecipe(levels=4, batch_size=3)


@pytest.fixture
def dense(checkpoint):
    return load_dense(str(checkpoint("qwen2")), "kv_group", CPU)


def tensors_of(folder):
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def assert_same(one, other, tolerance=0.0):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        for key, tensor in tensors.items():
            if key.endswith("kept"):
                assert torch.equal(tensor, other[name][key]), (name, key)
            else:
                torch.testing.assert_close(tensor, other[name][key], rtol=tolerance, atol=tolerance)


def test_walk_blocks_grams_match_whole_model(dense, calibration, tmp_path):
    inputs, streams = {}, {}
    for site in dense.sites:
        dense.model.get_submodule(site.output).register_forward_pre_hook(
            lambda _, args, name=site.name: inputs.__setitem__(name, args[0].flatten(0, 1).double())
        )
    for index, layer in enumerate(dense.model.model.layers):
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, index=index: streams.__setitem__(f"layers.{index}.attention", args[0])
        )
        layer.register_forward_hook(lambda *args, index=index: streams.__setitem__(f"layers.{index}.mlp", args[2]))
    with torch.no_grad():
        dense.model(calibration)
    phases = Phases()
    walked = dict(walk_blocks(dense, calibration, batch_size=3, scratch=tmp_path, phases=phases))
    assert [site.name for site in walked] == [site.name for site in dense.sites]
    for site, statistics in walked.items():
        x = inputs[site.name] / streams[site.name].flatten(0, 1).double().norm(dim=1, keepdim=True)
        torch.testing.assert_close(statistics.gram_II.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        assert torch.equal(statistics.gram_II, statistics.gram_II.T)
    assert set(phases.seconds) == {"read", "forward", "Gram"}


@pytest.mark.parametrize("offload", ["device", "cpu", "disk"])
def test_offload_of_activations_changes_nothing(offload, dense, calibration, tmp_path):
    build_database(dense, calibration, RECIPE, tmp_path / "auto")
    recipe = RECIPE.model_copy(update={"offload": offload})
    build_database(dense, calibration, recipe, tmp_path / offload)
    assert_same(tmp_path / "auto", tmp_path / offload)
    assert not list((tmp_path / offload).glob("*.draft"))


def test_choose_place(monkeypatch):
    monkeypatch.setattr("darwinlm.database.activations.available_memory", lambda: 1_000)
    assert choose_place(100, CPU) == "device"
    assert choose_place(900, CPU) == "disk"


def test_activations_on_disk(tmp_path):
    with open_activations((4, 3, 2), torch.bfloat16, CPU, "disk", tmp_path) as stored:
        values = torch.arange(24, dtype=torch.bfloat16).view(4, 3, 2)
        stored[:] = values
        assert torch.equal(stored, values)
        assert [file.stat().st_size for file in tmp_path.iterdir()] == [48]
    assert not list(tmp_path.iterdir())


def test_build_resumes(dense, calibration, tmp_path):
    whole = build_database(dense, calibration, RECIPE, tmp_path / "whole")
    broken = build_database(dense, calibration, RECIPE, tmp_path / "broken")
    index = json.loads((broken.folder / "index.json").read_text())
    del index["checksum"]
    for name in ("layers.0.mlp", "layers.1.attention"):
        del index["sites"][name]
        (broken.folder / f"{name}.safetensors").unlink()
    (broken.folder / "index.json").write_text(json.dumps(index))
    build_database(dense, calibration, RECIPE, tmp_path / "broken")
    assert_same(whole.folder, broken.folder)
    assert (whole.folder / "index.json").read_bytes() == (broken.folder / "index.json").read_bytes()


RANKS = """
import sys, warnings
from pathlib import Path
import torch
from safetensors.torch import load_file
from darwinlm.runtime import dist
from darwinlm.models.loading import load_dense
from darwinlm.database.build import build_database
from darwinlm.config.recipe import DatabaseRecipe
dist.start()
assert dist.world_size() == 2
root = Path(sys.argv[2])
dense = load_dense(sys.argv[1], "kv_group", torch.device("cpu"))
tokens = load_file(root / "tokens.safetensors")["tokens"]
build_database(dense, tokens, DatabaseRecipe(levels=4, batch_size=3), root / "two")
dist.stop()
"""


@pytest.mark.slow
def test_two_ranks_build_same_database(dense, checkpoint, calibration, tmp_path):
    from safetensors.torch import save_file

    save_file({"tokens": calibration}, tmp_path / "tokens.safetensors")
    (tmp_path / "ranks.py").write_text(RANKS)
    build_database(dense, calibration, RECIPE, tmp_path / "one")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "ranks.py")]
    done = subprocess.run(
        [sys.executable, *command, str(checkpoint("qwen2")), str(tmp_path)],
        env={**os.environ, "MASTER_ADDR": "localhost"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "one", tmp_path / "two", tolerance=1e-3)


def test_database_dtype(dense, calibration, tmp_path):
    build_database(replace(dense, dtype=torch.bfloat16), calibration, RECIPE, tmp_path)
    stored = load_file(tmp_path / "layers.0.mlp.safetensors")
    assert stored["1.output"].dtype == torch.bfloat16
    assert Database(tmp_path).cut(dense.sites[1], 1, CPU).output_weight.dtype == torch.bfloat16


def test_damaged_file_and_old_format(dense, calibration, tmp_path):
    database = build_database(dense, calibration, RECIPE, tmp_path)
    file = tmp_path / "layers.1.mlp.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.safetensors cannot be read \(its checksum"):
        database.cut(dense.sites[3], 1, CPU)
    index = json.loads((tmp_path / "index.json").read_text())
    del index["checksum"]
    (tmp_path / "index.json").write_text(json.dumps({**index, "format": 1}))
    with pytest.raises(UserError, match="is a database of format 1, but this version reads format 2"):
        Database(tmp_path)


def test_activation_overflow_names_site(checkpoint, tmp_path):
    dense = load_dense(str(checkpoint("llama")), "kv_group", CPU)
    tokens = torch.randint(0, VOCABULARY, (2, 8))
    block = dense.block

    def damaged(layer):
        made = block(layer)
        if layer == 1:
            made.mlp.up_proj.weight.data[3, 3] = torch.inf
        return made

    object.__setattr__(dense, "block", damaged)
    with pytest.raises(InvalidTensorError, match=r"layers\.1\.mlp: its activations contain NaN or Inf"):
        list(walk_blocks(dense, tokens, batch_size=1, scratch=tmp_path))


def test_damping_too_small_names_site(dense, calibration, tmp_path):
    recipe = RECIPE.model_copy(update={"damping": 1e-30})
    message = r"layers\.\d\.\w+: its Gram matrix is numerically singular at database.damping=1e-30; raise it"
    with pytest.raises(UserError, match=message):
        build_database(dense, calibration[:1, :4], recipe, tmp_path)


def test_out_of_memory_reduces_blocks_per_pass(dense, calibration, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("darwinlm.database.grams._NO_LIMIT", ())
    whole = build_database(dense, calibration, RECIPE.model_copy(update={"batch_size": 2}), tmp_path / "whole")
    seen, forward = [], Qwen2DecoderLayer.forward

    def small(layer, states_BTD, **arguments):
        seen.append(len(states_BTD))
        output = forward(layer, states_BTD, **arguments)  # the sums are already updated
        if len(states_BTD) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return output

    monkeypatch.setattr(Qwen2DecoderLayer, "forward", small)
    recipe = RECIPE.model_copy(update={"batch_size": 8})
    built = build_database(dense, calibration, recipe, tmp_path / "small")
    assert seen == [8, 4, 2] + 3 * 4 * [2]
    assert "database: 8 blocks per pass do not fit in device memory; using 2" in caplog.text
    assert_same(whole.folder, built.folder)


def test_out_of_memory_with_one_block_fails(dense, calibration, tmp_path, monkeypatch):
    def none(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("darwinlm.database.grams._NO_LIMIT", ())
    monkeypatch.setattr(Qwen2DecoderLayer, "forward", none)
    with pytest.raises(torch.OutOfMemoryError):
        build_database(dense, calibration, RECIPE, tmp_path)


def test_background_writing_same_database(dense, calibration, tmp_path, monkeypatch):
    build_database(dense, calibration, RECIPE, tmp_path / "one")
    monkeypatch.setattr(build, "_SMALL", 0)
    threads = set()
    write_site = Database.write_site

    def write(database, site, *arguments, **facts):
        threads.add(threading.current_thread())
        return write_site(database, site, *arguments, **facts)

    monkeypatch.setattr(Database, "write_site", write)
    phases = Phases()
    build_database(dense, calibration, RECIPE, tmp_path / "other", phases)
    assert threading.main_thread() not in threads and phases.seconds["write"] > 0
    assert_same(tmp_path / "one", tmp_path / "other")
    indices = [json.loads((tmp_path / name / "index.json").read_text()) for name in ("one", "other")]
    assert indices[0] == indices[1]


def test_background_writing_error(dense, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_SMALL", 0)
    write_site = Database.write_site

    def write(database, site, *arguments, **facts):
        if site.name == "layers.1.mlp":
            raise UserError("the disk is full")
        return write_site(database, site, *arguments, **facts)

    monkeypatch.setattr(Database, "write_site", write)
    with pytest.raises(UserError, match="the disk is full"):
        build_database(dense, calibration, RECIPE, tmp_path)
    monkeypatch.undo()
    assert "layers.1.mlp" not in json.loads((tmp_path / "index.json").read_text())["sites"]
    whole = build_database(dense, calibration, RECIPE, tmp_path)
    assert all(site in whole for site in dense.sites)


def test_resident_cuts_least_recently_used_evicted():
    database = Database.__new__(Database)
    database._resident = OrderedDict()
    for number in range(5):
        database._keep(("site", number), Cut((0,), torch.zeros(10)), room=100)
    assert list(database._resident) == [("site", 3), ("site", 4)]
    database._keep(("site", 9), Cut((0,), torch.zeros(100)), room=100)
    assert not database._resident
