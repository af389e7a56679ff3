"""Tests of folders for mlx-lm: they contain what its code reads. mlx-lm is large and not installed."""

import ast
import json

import pytest
import torch
from helpers import FAMILIES, make_config, save_pruned, uninstall
from safetensors.torch import load_file
from shapes import SHAPES

from darwinlm import UserError
from darwinlm.cli import exit_code
from darwinlm.export import mlx
from darwinlm.export.targets import export_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 10_000.0,
}


@pytest.mark.parametrize("shape", ["groups differ", "only half layers", "middle without both"])
@pytest.mark.parametrize("family", [*FAMILIES, "phi3", "gemma3_text", "olmo2", "glm4", "smollm3"])
def test_mlx_folder_contains_settings_of_its_code(family, shape, tmp_path, monkeypatch):
    """The config has every setting that the code reads and the sizes of the tensors; there is one code file."""
    uninstall(mlx.PACKAGE, monkeypatch)
    config = make_config(family)
    config.per_layer_config = SHAPES[shape] or None
    save_pruned(config, tmp_path / "model")
    folder = export_model(tmp_path, "mlx").path
    settings = json.loads((folder / "config.json").read_text())
    assert [file.name for file in folder.glob("*.py")] == [settings["model_file"]] and "auto_map" not in settings
    code = ast.parse((folder / settings["model_file"]).read_text())
    classes = {one.name: one for one in code.body if isinstance(one, ast.ClassDef)}
    assert {"Model", "ModelArgs"} <= set(classes)
    fields = {one.target.id: one.value for one in classes["ModelArgs"].body if isinstance(one, ast.AnnAssign)}
    assert {name for name, default in fields.items() if default is None} <= set(settings)

    layers = {int(layer): sizes for layer, sizes in settings.get("per_layer_config", {}).items()}
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):

        def size(name, layer=layer):
            return layers.get(layer, {}).get(name, settings.get(name))

        skipped = layers.get(layer, {}).get("skip", [])
        prefix = f"model.layers.{layer}."
        expected = {}
        if "attention" not in skipped:
            expected |= {"self_attn.q_proj": size("num_attention_heads") * settings["head_dim"]}
            expected |= {"self_attn.v_proj": size("num_key_value_heads") * settings["head_dim"]}
        if "mlp" not in skipped:
            expected |= {"mlp.up_proj": size("intermediate_size")}
        found = {name: len(tensors[f"{prefix}{name}.weight"]) for name in expected}
        assert found == expected
        parts = {name.split(".")[3] for name in tensors if name.startswith(prefix)}
        assert ("self_attn" in parts, "mlp" in parts) == ("attention" not in skipped, "mlp" not in skipped)


@pytest.mark.parametrize("rope", [None, LLAMA3])
def test_mlx_rope_periods_match_transformers(rope, tmp_path, monkeypatch, capsys):
    uninstall(mlx.PACKAGE, monkeypatch)
    config = make_config("llama", **({"rope_parameters": rope} if rope else {}))
    model = save_pruned(config, tmp_path / "model")
    assert exit_code(["export", str(tmp_path), "--to", "mlx"]) == 0
    assert "not verified: run pip install mlx-lm 'mlx[cpu]'" in capsys.readouterr().out
    settings = json.loads((tmp_path / "model-mlx" / "config.json").read_text())
    positions = torch.arange(100.0)[None]
    cos, _ = model.model.rotary_emb(torch.zeros(1), positions)
    assert settings["layer_ropes"] == [0, 0, 0]
    (rope,) = settings["ropes"]
    angles = positions[0, :, None] / torch.tensor(rope["periods"], dtype=torch.float64)
    assert torch.allclose(cos[0, :, : config.head_dim // 2].double(), angles.cos(), atol=1e-4)
    assert rope["scaling"] == 1


@pytest.mark.parametrize(
    ("changes", "shape", "match"),
    [
        ({"hidden_act": "gelu"}, {}, "supports silu and gelu_pytorch_tanh; the model uses gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, {}, "the model uses dynamic"),
        (
            {},
            {1: {"num_attention_heads": 4, "num_key_value_heads": 2, "query_heads_per_kv_head": [1, 3]}},
            "serve 1 and 3 query heads, but MLX only supports equal",
        ),
    ],
)
def test_mlx_unsupported_model_refused(changes, shape, match, tmp_path):
    config = make_config("llama", **changes)
    config.per_layer_config = shape or None
    save_pruned(config, tmp_path / "model")
    with pytest.raises(UserError, match=match):
        export_model(tmp_path, "mlx")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
