"""Tests of the folder for vLLM's Transformers backend: same function, and all that the backend needs."""

import ast
import inspect
import json
import textwrap

import pytest
import torch
from helpers import FAMILIES, make_config, save_pruned
from shapes import ATTENTION, BOTH, SHAPES
from transformers import AutoModel, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from darwinlm import UserError
from darwinlm.cli import exit_code
from darwinlm.export.hf import MODULE
from darwinlm.export.targets import export_model
from darwinlm.models.families import auto_map, empty_layer
from darwinlm.models.pruned import load

TOKENS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_folder_adds_attention_stubs(family, shape, tmp_path):
    config = make_config(family)
    config.per_layer_config = SHAPES[shape] or None
    model = save_pruned(config, tmp_path / "model")
    exported = export_model(tmp_path, "vllm")
    written = load(exported.path)
    with torch.no_grad():
        assert torch.equal(written(TOKENS).logits, model(TOKENS).logits)
    assert exported.proof.difference == 0

    # The backend builds its caches from the layer sizes in the config, which must match the tensors.
    gone = sum(layer == BOTH for layer in SHAPES[shape].values())
    assert len(written.model.layers) == written.config.num_hidden_layers == max(1, 3 - gone)
    kinds = getattr(written.config, "layer_types", None)
    assert kinds is None or len(kinds) == written.config.num_hidden_layers
    for index, layer in enumerate(written.model.layers):
        sizes = written.config.per_layer_config[index]
        assert layer.self_attn.layer_idx == index
        assert layer.self_attn.q_proj.out_features == sizes.num_attention_heads * config.head_dim
        assert layer.self_attn.v_proj.out_features == sizes.num_key_value_heads * config.head_dim
        assert sizes.num_attention_heads % sizes.num_key_value_heads == 0


def test_vllm_tensor_parallel_stubs(tmp_path):
    config = make_config("llama")
    config.per_layer_config = {0: {"num_attention_heads": 3, "num_key_value_heads": 1}, 1: ATTENTION}
    save_pruned(config, tmp_path / "odd")
    with pytest.raises(UserError, match=r"layer 0 has 1 KV heads, which are not divisible by 2 devices.*parallel=2"):
        export_model(tmp_path / "odd", "vllm", tensor_parallel=2)
    config.per_layer_config = {0: {"intermediate_size": 31}}
    save_pruned(config, tmp_path / "odd")
    with pytest.raises(UserError, match="layer 0 has 31 MLP channels"):
        export_model(tmp_path / "odd", "vllm", tensor_parallel=2)
    config.per_layer_config = {0: {"intermediate_size": 30}, 1: ATTENTION}
    model = save_pruned(config, tmp_path / "even")
    arguments = ["export", str(tmp_path / "even"), "--to", "vllm", "--tensor-parallel", "2"]
    assert exit_code(arguments) == 0
    written = load(tmp_path / "even-vllm")
    assert written.config.per_layer_config[1].num_key_value_heads == 2
    with torch.no_grad():
        assert torch.equal(written(TOKENS).logits, model(TOKENS).logits)
    with pytest.raises(UserError, match="--tensor-parallel only applies to --to vllm"):
        export_model(tmp_path / "even", "gguf", tensor_parallel=2)


def test_vllm_folder_files(tmp_path, capsys):
    config = make_config("qwen2")
    config.per_layer_config = SHAPES["first without attention"]
    model = save_pruned(config, tmp_path / "model").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "plan.json").write_text("{}")
    assert exit_code(["export", str(tmp_path / "model"), "--to", "vllm"]) == 0
    told = capsys.readouterr().out
    assert "not run in vLLM itself" in told and "verified: largest logit difference 0.0e+00" in told
    folder = tmp_path / "model-vllm"
    settings = json.loads((folder / "config.json").read_text())
    assert settings["auto_map"] == auto_map(model.config, MODULE)
    assert settings["dtype"] == "bfloat16" and settings["architectures"] == ["DarwinLMQwen2ForCausalLM"]
    assert {"plan.json", "generation_config.json", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert AutoTokenizer.from_pretrained(folder)("ab").input_ids == [64, 65]
    # The model class of the backend comes from the folder's own file.
    own = get_class_from_dynamic_module(settings["auto_map"]["AutoModel"], str(folder))
    assert own.is_backend_compatible()
    assert isinstance(AutoModel.from_pretrained(folder, trust_remote_code=True), own)
    # A second export replaces the first.
    assert exit_code(["export", str(tmp_path / "model"), "--to", "vllm"]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_source_matches_vllm_backend(family):
    """vLLM detects attention in the source: one call of a local name taken from ALL_ATTENTION_FUNCTIONS."""
    attention = empty_layer(make_config(family), 0).self_attn
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(attention).forward))))
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign | ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func).startswith("ALL_ATTENTION_FUNCTIONS.")
        for target in ([node.target] if isinstance(node, ast.AnnAssign) else node.targets)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]
    assert len(calls) == 1
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in calls[0].keywords}["scaling"] == "self.scaling"


def test_vllm_unsupported_model_refused(tmp_path):
    config = make_config("llama")
    config.per_layer_config = {
        1: {"num_attention_heads": 4, "num_key_value_heads": 2, "query_heads_per_kv_head": [1, 3]}
    }
    save_pruned(config, tmp_path / "uneven")
    with pytest.raises(UserError, match="serve 1 and 3 query heads, but vLLM only supports equal numbers"):
        export_model(tmp_path / "uneven", "vllm")
    save_pruned(make_config("llama"), tmp_path / "model")
    with pytest.raises(UserError, match="already exists and is not an earlier export"):
        export_model(tmp_path / "model", "vllm", tmp_path / "uneven")
    with pytest.raises(UserError, match="--dtype only applies to --to gguf"):
        export_model(tmp_path / "model", "vllm", dtype="f16")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "uneven"]
