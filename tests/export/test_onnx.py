"""Tests of ONNX files in onnxruntime."""

import json

import numpy as np
import onnx as onnx_format
import pytest
import torch
from helpers import make_config, save_pruned, uninstall
from shapes import ATTENTION, MLP

from darwinlm import UserError
from darwinlm.export import onnx
from darwinlm.export.onnx import onnx_logits
from darwinlm.export.proof import logits_of
from darwinlm.export.targets import export_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Model with a sliding window and layers without attention or MLP, and its ONNX folder."""
    folder = tmp_path_factory.mktemp("onnx")
    config = make_config("mistral")
    config.per_layer_config = {0: {"num_attention_heads": 3, "num_key_value_heads": 1}, 1: ATTENTION, 2: MLP}
    return save_pruned(config, folder / "model"), export_model(folder, "onnx")


def test_onnx_logits_at_any_length(exported):
    model, done = exported
    assert done.proof.positions == 128 and done.proof.difference < 1e-5
    for length in (1, 2, 50):
        tokens = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        expected = logits_of(model, tokens)
        assert np.abs(onnx_logits(done.path, tokens) - expected).max() < 1e-4 * np.abs(expected).max()


def test_onnx_folder_files(exported, tmp_path):
    _, done = exported
    assert {file.name for file in done.path.iterdir()} >= {"model.onnx", "tokenizer.json", "export.json"}
    graph = onnx_format.load(done.path / "model.onnx", load_external_data=False).graph
    assert [one.name for one in graph.input] == ["input_ids"] and [one.name for one in graph.output] == ["logits"]
    assert [size.dim_param for size in graph.input[0].type.tensor_type.shape.dim] == ["batch", "length"]
    assert "no KV cache" in done.notes[0]
    facts = json.loads((done.path / "export.json").read_text())
    assert facts["proof"]["agreeing"] == facts["proof"]["positions"]


def test_onnx_missing_packages(exported, tmp_path, monkeypatch):
    _, done = exported
    source = done.path.with_name("model")
    monkeypatch.setattr(onnx, "_WRITERS", ("no_such_module", "onnxscript"))
    with pytest.raises(UserError, match="needs no_such_module; run: pip install onnxscript onnxruntime"):
        export_model(source, "onnx", tmp_path / "new")
    monkeypatch.undo()
    monkeypatch.setattr(onnx, "write_onnx", lambda model, folder: (folder / "model.onnx").write_bytes(b"not a graph"))
    with pytest.raises(UserError, match=r"onnxruntime .* cannot run the folder; export discarded"):
        export_model(source, "onnx", tmp_path / "new")
    monkeypatch.setattr(onnx, "onnx_logits", lambda folder, tokens: np.zeros((len(tokens), 259), np.float32))
    with pytest.raises(UserError, match="folder: logits differ from the pruned model; export discarded"):
        export_model(source, "onnx", tmp_path / "new")
    uninstall(onnx.PACKAGE, monkeypatch)
    told = export_model(source, "onnx", tmp_path / "new")
    assert told.proof is None and told.notes[0].startswith("not verified: run pip install onnxruntime")
