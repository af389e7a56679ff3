"""Tests of checkpoints of several files: they are read, and written if a single file would be too large."""

import json
import shutil

import pytest
import torch
from helpers import SETTINGS, TARGET, make_tokenizer
from transformers import AutoModelForCausalLM

import darwinlm
from darwinlm import export_model, prune
from darwinlm.export import hf, hf_native, mlx

pytestmark = pytest.mark.slow

INDEX = "model.safetensors.index.json"


def weights_of(folder):
    """Return the files of a checkpoint, and its tensors."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return sorted(file.name for file in folder.glob("*.safetensors")), model.state_dict()


@pytest.fixture
def small_files(monkeypatch):
    for module in (hf, hf_native, mlx):
        monkeypatch.setattr(module, "SHARD", "40KB")


def test_sharded_checkpoint_pruned_and_written(checkpoint, run, text, small_files, tmp_path):
    whole, _ = run
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    make_tokenizer().save_pretrained(tmp_path / "sharded")
    files, tensors = weights_of(tmp_path / "sharded")
    assert len(files) > 3 and (tmp_path / "sharded" / INDEX).exists()

    # Layers are memory-mapped from the files that contain them; the result is the same as from a single file.
    settings = SETTINGS | {"data.source": str(text), "search.offload": "cpu"}
    streamed = prune(tmp_path / "sharded", target=TARGET, out=tmp_path / "streamed", settings=settings)
    again = prune(
        tmp_path / "sharded", target=TARGET, out=tmp_path / "run", settings=SETTINGS | {"data.source": str(text)}
    )
    for pruned in (again, streamed):
        files, tensors = weights_of(pruned.model_path)
        index = json.loads((pruned.model_path / INDEX).read_text())
        assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    one_file, expected = weights_of(whole.model_path)
    assert one_file == ["model.safetensors"]
    _, tensors = weights_of(again.model_path)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)

    ids = torch.arange(24).view(1, 24)
    assert torch.equal(again.load()(ids).logits, whole.load()(ids).logits)
    # A missing file of the result is an error.
    (again.model_path / files[-1]).unlink()
    with pytest.raises(darwinlm.UserError, match="cannot be loaded"):
        again.load()


@pytest.mark.parametrize("target", ["gguf", "mlx", "hf-native", "vllm"])
def test_sharded_checkpoint_exported(target, checkpoint, text, small_files, tmp_path):
    settings = SETTINGS | {"data.source": str(text), "search.uniform": True, "recovery.tokens": 0}
    out = prune(checkpoint("llama"), target=TARGET, out=tmp_path / "run", settings=settings).path
    assert (out / "model" / INDEX).exists()
    done = export_model(out, target)
    if target == "hf-native":
        files, tensors = weights_of(done.path)
        assert len(files) > 2
        _, expected = weights_of(out / "model")
        assert sum(map(torch.numel, tensors.values())) == sum(map(torch.numel, expected.values()))
    assert done.proof is not None or target == "mlx"
    shutil.rmtree(out)
