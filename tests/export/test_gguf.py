"""Tests of GGUF files in llama.cpp: logits and token ids equal those of transformers, for all families and shapes."""

import json
import sys

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from helpers import FAMILIES, VOCABULARY, make_config, make_tokenizer, save_pruned, uninstall
from safetensors.torch import load_file, save_file
from shapes import ATTENTION, MLP, SHAPES

from darwinlm import UserError
from darwinlm.cli import exit_code
from darwinlm.engines import llama_cpp, quantize
from darwinlm.engines.llama_cpp import Engine, EngineError, ask
from darwinlm.export import gguf
from darwinlm.export.gguf_tokenizer import read_vocabulary
from darwinlm.export.proof import logits_of
from darwinlm.export.targets import TARGETS, export_model
from darwinlm.models.pruned import load

TOKENS = torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(4)).tolist()
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": YARN,
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "yarn, own settings": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.7, "truncate": False},
}


def differences(folder, file, tokens=TOKENS):
    """Return the difference of llama.cpp and transformers logits at each position, relative to the largest logit."""
    engine = Engine(file)
    found, expected = engine.logits(tokens), logits_of(load(folder), tokens)
    engine.close()
    assert (found.argmax(-1) == expected.argmax(-1)).all() or np.abs(found - expected).max() > 1e-3
    return np.abs(found - expected).max(-1) / np.abs(expected).max()


def write(config, folder):
    save_pruned(config, folder)
    model = load(folder)
    vocabulary = read_vocabulary(make_tokenizer(), VOCABULARY, folder)
    architecture = gguf.choose_architecture(config)
    gguf.write_gguf(model, vocabulary, folder / "model.gguf", "f32", "tiny", architecture)
    return folder / "model.gguf"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_logits_match_transformers(family, shape, tmp_path):
    config = make_config(family, sliding_window=None)
    config.per_layer_config = SHAPES[shape] or None
    assert differences(tmp_path, write(config, tmp_path)).max() < 1e-4


HALF_A_HEAD = {"rope_parameters": {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("seed_oss", {"attention_out_bias": True}),
        ("ernie4_5", {"use_bias": True}),
        ("granite", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("granite", {"tie_word_embeddings": False}),
        ("glm", {}),
        ("phi3", {"sliding_window": None}),
        ("phi3", {"sliding_window": None} | HALF_A_HEAD),
        ("ministral", {"sliding_window": 64}),
        ("cwm", {"sliding_window": 64}),
        ("smollm3", {"no_rope_layer_interval": 4}),
    ],
)
def test_gguf_logits_of_other_layouts(family, settings, tmp_path):
    config = make_config(family, **settings)
    config.per_layer_config = SHAPES["groups differ"] | {2: ATTENTION}
    assert differences(tmp_path, write(config, tmp_path)).max() < 1e-4


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": None, "head_dim": 32}),
    ],
)
def test_gguf_tied_heads_biases_and_head_sizes(family, settings, tmp_path):
    config = make_config(family, **settings)
    config.per_layer_config = SHAPES["only half layers"]
    assert differences(tmp_path, write(config, tmp_path)).max() < 1e-4


@pytest.mark.parametrize(
    ("family", "rope"), [*[("llama", rope) for rope in ROPES], ("qwen3", "linear"), ("qwen3", "yarn")]
)
def test_gguf_scaled_rope(family, rope, tmp_path):
    config = make_config(family, rope_parameters={**ROPES[rope], "rope_theta": 10_000.0})
    config.per_layer_config = SHAPES["groups differ"]
    assert differences(tmp_path, write(config, tmp_path)).max() < 1e-4
    # The settings matter for these tokens: logits differ without them.
    plain = make_config(family)
    plain.per_layer_config = SHAPES["groups differ"]
    other = logits_of(save_pruned(plain, tmp_path / "plain"), TOKENS)
    assert np.abs(other - logits_of(load(tmp_path), TOKENS)).max() > 0.01


def test_gguf_without_stubs_fails(tmp_path, monkeypatch):
    stub = gguf._stub

    def no_mlp(config, architecture, shape, like):
        parts = stub(config, architecture, shape, like)
        return {name: part for name, part in parts.items() if shape.width or not name.startswith("ffn")}

    monkeypatch.setattr(gguf, "STUB_WIDTH", 0)
    monkeypatch.setattr(gguf, "_stub", no_mlp)
    middle = make_config("llama")
    middle.per_layer_config = SHAPES["middle without MLP"]
    assert differences(tmp_path, write(middle, tmp_path)).max() > 0.05
    last = make_config("llama")
    last.per_layer_config = SHAPES["last without MLP"]
    with pytest.raises(EngineError):
        ask(write(last, tmp_path / "last"), TOKENS)
    with pytest.raises(UserError, match="cannot run the file; export discarded"):
        export_model(tmp_path / "last", "gguf", tmp_path / "new.gguf")
    save_pruned(middle, tmp_path / "middle")
    with pytest.raises(UserError, match="logits differ from the pruned model; export discarded"):
        export_model(tmp_path / "middle", "gguf", tmp_path / "new.gguf")
    assert not list(tmp_path.glob("new*"))


def test_gguf_first_layer_without_attention_needs_stub(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "file_shapes", lambda config, _: gguf.layer_shapes(config))
    config = make_config("llama")
    config.per_layer_config = SHAPES["first without attention"]
    with pytest.raises(EngineError):
        ask(write(config, tmp_path), TOKENS)


@pytest.mark.parametrize(("dtype", "most"), [("f16", 5e-3), ("bf16", 0.05), ("q8_0", 0.15)])
def test_gguf_smaller_dtypes(dtype, most, tmp_path):
    config = make_config("llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=4)
    config.per_layer_config = {0: {"intermediate_size": 48}, 1: ATTENTION, 2: MLP}
    save_pruned(config, tmp_path / "model")
    exported = export_model(tmp_path, "gguf", dtype=dtype)
    assert exported.path == tmp_path / f"model-{dtype}.gguf"
    assert 1e-6 < differences(tmp_path / "model", exported.path).max() < most
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(exported.path).tensors}
    assert kinds["blk.1.ffn_down.weight"] == dtype.upper()
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if dtype == "q8_0" else dtype.upper())  # 48 is not a multiple of 32
    assert kinds["output_norm.weight"] == kinds["blk.2.attn_q.bias"] == "F32"


ENGINE = """#!{python}
import shutil, sys
source, file, kind, threads = sys.argv[1:]
assert kind == "Q4_K_M" and int(threads) > 0 and open(source, "rb").read(4) == b"GGUF"
{body}
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Install a fake `llama-quantize` on the PATH that runs `body`, without llama-cpp-python."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(quantize, "_LIBRARY", "no-such-package")

    def install(body):
        program = tmp_path / "bin" / "llama-quantize"
        program.parent.mkdir(exist_ok=True)
        program.write_text(ENGINE.format(python=sys.executable, body=body))
        program.chmod(0o755)

    return install


def test_k_quants_made_and_verified(stand_in, tmp_path):
    config = make_config("llama")
    config.per_layer_config = SHAPES["middle without MLP"]
    save_pruned(config, tmp_path / "model")
    with pytest.raises(UserError, match=r"its program llama-quantize is not on the PATH and .* pip install"):
        export_model(tmp_path, "gguf", dtype="q4_k_m")
    stand_in("shutil.copyfile(source, file)")
    exported = export_model(tmp_path, "gguf", dtype="q4_k_m")
    assert exported.path == tmp_path / "model-q4_k_m.gguf" and exported.proof.difference < 1e-4
    assert {file.name for file in tmp_path.glob("model-*")} == {"model-q4_k_m.gguf", "model-q4_k_m.gguf.json"}


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("sys.exit('llama_model_quantize: failed to quantize: no room')", "failed to write q4_k_m: .*no room"),
        ("", "failed to write q4_k_m: exit code 0"),
        ("open(file, 'wb').write(open(source, 'rb').read()[:-400])", "cannot run the file; export discarded"),
        (
            "d = bytearray(open(source, 'rb').read()); d[-9000:] = bytes(9000); open(file, 'wb').write(d)",
            "logits differ",
        ),
    ],
)
def test_k_quants_discarded_after_failure(body, match, stand_in, tmp_path):
    save_pruned(make_config("llama"), tmp_path / "model")
    stand_in(body)
    with pytest.raises(UserError, match=match):
        export_model(tmp_path, "gguf", dtype="q4_k_m")
    assert not list(tmp_path.glob("model-*"))


def test_gguf_sliding_window_limits_context(tmp_path):
    config = make_config("mistral")
    config.per_layer_config = SHAPES["middle without MLP"]
    save_pruned(config, tmp_path / "model")
    exported = export_model(tmp_path, "gguf")
    assert exported.proof.positions == 8
    assert "supports 8 positions" in exported.notes[0]
    assert GGUFReader(exported.path).get_field("deci.context_length").contents() == 8
    by_position = differences(tmp_path / "model", exported.path)
    assert by_position[:8].max() < 1e-4 < by_position[8:].max()


def test_export_command_reports_verification(tmp_path, capsys, monkeypatch):
    config = make_config("llama")
    config.per_layer_config = SHAPES["last without attention"]
    save_pruned(config, tmp_path / "model")
    assert exit_code(["export", str(tmp_path), "--to", "gguf", "--out", str(tmp_path / "a.gguf")]) == 0
    told = capsys.readouterr().out
    assert "verified: largest logit difference" in told
    assert f"exported: {tmp_path / 'a.gguf'}" in told
    kept = json.loads((tmp_path / "a.gguf.json").read_text())
    assert kept["architecture"] == "deci" and kept["proof"]["difference"] < 1e-4
    assert kept["proof"]["agreeing"] == kept["proof"]["positions"] > 100
    uninstall(llama_cpp.PACKAGE, monkeypatch)
    assert exit_code(["export", str(tmp_path), "--to", "gguf", "--out", str(tmp_path / "a.gguf")]) == 0
    assert "not verified: run pip install xllamacpp" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.gguf.json").read_text())["proof"] is None


@pytest.mark.parametrize(
    ("settings", "shape", "match"),
    [
        (("qwen3", {"tie_word_embeddings": False}), {}, "an untied head.*--to vllm.*hf-native"),
        (("qwen3", {"attention_bias": True}), {}, "openelm.*does not support biases .qkv_bias"),
        (("qwen3", {"rope_parameters": {**ROPES["llama3"], "rope_theta": 1e4}}), {}, "rope scaling.*llama3"),
        (("qwen3", {"rope_parameters": {**YARN, "beta_slow": 2.0, "rope_theta": 1e4}}), {}, "rope scaling.*beta_slow"),
        (("llama", {"hidden_act": "gelu"}), {}, "uses silu, but the model uses gelu"),
        (("gemma3_text", {}), {}, "no norms of the outputs of attention and MLP.*--to vllm or mlx"),
        (("gemma", {}), {}, r"no norms that multiply by 1 \+ their weight"),
        (("smollm3", {}), {}, "the same rope in all layers, and layer 1 of the model differs; export --to vllm"),
        (("glm", {"rope_parameters": HALF_A_HEAD["rope_parameters"] | YARN}), {}, "rope scaling: .*yarn"),
        (
            ("llama", {}),
            {1: {"num_attention_heads": 4, "num_key_value_heads": 2, "query_heads_per_kv_head": [1, 3]}},
            "layer 1 has KV heads that serve 1 and 3 query heads.*kv_group",
        ),
    ],
)
def test_gguf_unsupported_model_refused(settings, shape, match, tmp_path):
    family, changed = settings
    config = make_config(family, **changed)
    config.per_layer_config = shape or None
    save_pruned(config, tmp_path / "model")
    with pytest.raises(UserError, match=match):
        export_model(tmp_path, "gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--to", "openvino"], "unknown target; choose one of gguf"),
        (["--to", "gguf", "--dtype", "q4"], "choose one of f32, f16, q8_0, bf16, q4_k_m"),
        (["--to", "gguf", "--out", "."], "is a folder"),
        (["--to", "gguf", "--out", "notes.txt"], "already exists and is not a GGUF file"),
    ],
)
def test_export_command_error_one_line(arguments, match, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pruned(make_config("llama"), tmp_path / "model")
    (tmp_path / "notes.txt").write_text("mine")
    assert exit_code(["export", "model", *arguments]) == 2
    told = capsys.readouterr().err
    assert match in told and told.count("\n") == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("target", TARGETS)
def test_export_of_damaged_model(target, tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(UserError, match="contains no model"):
        export_model(folder, target)
    save_pruned(make_config("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its files are missing model\.layers\.1\.mlp\.up_proj\.bias; download the"):
        export_model(folder, target)
    (folder / "model.safetensors").write_bytes(b"\x10" * 30)
    with pytest.raises(UserError, match="the model cannot be loaded"):
        export_model(folder, target)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer|the model cannot be loaded"):
        export_model(folder, target)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_gguf_weights_beyond_float16_refused(tmp_path):
    config = make_config("llama")
    model = save_pruned(config, tmp_path / "model")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"output.weight contains values beyond the range of float16; use --dtype bf16"):
        export_model(tmp_path, "gguf", dtype="f16")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_llama_cpp_with_changed_api_refused(tmp_path, monkeypatch):
    file = write(make_config("llama"), tmp_path)
    monkeypatch.setitem(llama_cpp._DEFAULTS, "n_ctx", 4096)
    with pytest.raises(EngineError, match=r"the API of .* is not supported"):
        Engine(file).logits(TOKENS)
