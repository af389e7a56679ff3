"""Tests of models pruned by a former version, with its own modeling file for four families: the logits are the same."""

import json
from pathlib import Path

import pytest
import torch
from helpers import FAMILIES, make_tokenizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import darwinlm
from darwinlm.export.targets import export_model
from darwinlm.models.config import load_sizes
from darwinlm.models.loading import expected_shapes, load_dense

FORMER = json.loads((Path(__file__).parents[1] / "fixtures" / "former_checkpoints.json").read_text())
"""`config.json`, tensors, and logits computed by the former version, by family."""
TOKENS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(params=FAMILIES)
def former(request, tmp_path):
    known = FORMER[request.param]
    (tmp_path / "config.json").write_text(json.dumps(known["config"]))
    (tmp_path / "modeling_darwinlm.py").write_text("raise RuntimeError('code of a former version')\n")
    shapes, generator = expected_shapes(load_sizes(str(tmp_path))), torch.Generator().manual_seed(0)
    assert sorted(shapes) == known["tensors"]
    tensors = {
        name: 0.2 * torch.randn(shapes[name], generator=generator) + float("norm" in name) for name in sorted(shapes)
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path, torch.tensor(known["logits"])


def last_logits(model):
    with torch.no_grad():
        return model(TOKENS).logits[:, -1, :8]


def test_former_checkpoint_loads(former):
    folder, logits = former
    assert torch.allclose(last_logits(darwinlm.load(folder)), logits, atol=1e-4)


def test_former_checkpoint_pruned_further(former):
    folder, logits = former
    dense = load_dense(str(folder), "query_head", torch.device("cpu"))
    assert torch.allclose(last_logits(dense.model), logits, atol=1e-4)
    names = [site.name for site in dense.sites]
    assert names == ["layers.0.mlp", "layers.1.attention", "layers.1.mlp", "layers.2.attention"]


def test_former_checkpoint_code_renewed(former, tmp_path):
    folder, logits = former
    renewed = export_model(folder, "hf", tmp_path / "renewed").path
    model = AutoModelForCausalLM.from_pretrained(renewed, trust_remote_code=True)
    assert torch.allclose(last_logits(model), logits, atol=1e-4)
    settings = json.loads((renewed / "config.json").read_text())
    assert "base_model_type" not in settings and settings["pruned"]["layer_parts"]
