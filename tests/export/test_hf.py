"""Tests of a saved model in a clean process without darwinlm: logits, greedy tokens, and transformers features."""

import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import FAMILIES, GRANULARITIES, VOCABULARY, make_config, save_pruned, uneven_plan
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import darwinlm
from darwinlm.export.hf import _check_tokenizer, export_hf
from darwinlm.models.cutting import build_model

PYTHON = str(Path(os.environ.get("SAVED_MODEL_PYTHON", sys.executable)).absolute())
"""Python of the test; `make test-versions` sets one with the oldest supported transformers."""
CASES = [(family, granularity) for family in FAMILIES for granularity in GRANULARITIES]
TOKENS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(2))
NEW = 12

# Use the folder without `darwinlm`, which cannot be imported.
SCRIPT = """
import json, sys, warnings
sys.modules["darwinlm"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, StaticCache
torch.manual_seed(0)
root, names, new = sys.argv[1], sys.argv[2].split(","), int(sys.argv[3])
tokens = load_file(f"{root}/tokens.safetensors")["tokens"]
for name in names:
    folder, out = f"{root}/{name}", {}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert set(tokenizer("ab")) == {"input_ids", "attention_mask"}
    checks = {"tokenizer": tokenizer("ab").input_ids, "template": tokenizer.chat_template}
    greedy = dict(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=258)
    with torch.no_grad():
        out["logits"] = model(tokens).logits
        out["headless"] = AutoModel.from_pretrained(folder, trust_remote_code=True)(tokens).last_hidden_state
        out["last_hidden"] = model(tokens, output_hidden_states=True).hidden_states[-1]
        out["cached"] = model.generate(tokens, **greedy)
        out["uncached"] = model.generate(tokens, use_cache=False, **greedy)
        out["static"] = model.generate(tokens, cache_implementation="static", disable_compile=True, **greedy)
        out["beams"] = model.generate(tokens, num_beams=3, **greedy)
        out["beams_uncached"] = model.generate(tokens, num_beams=3, use_cache=False, **greedy)
        padded = torch.cat([torch.full((1, 4), 258), tokens[:1, :8]], 1)
        batch = torch.cat([padded, tokens[1:2]])
        mask = (batch != 258).long()
        mask[1] = 1
        out["left_padded"] = model.generate(batch, attention_mask=mask, **greedy)
        out["alone"] = model.generate(tokens[:1, :8], **greedy)
        model.set_attn_implementation("eager")
        out["eager"] = model(tokens).logits
        model.set_attn_implementation("sdpa")
    model.train()
    plain = model(tokens, labels=tokens).loss
    plain.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    checks["checkpointing"] = max((a - p.grad).abs().max().item() for a, p in zip(gradients, model.parameters()))
    model.gradient_checkpointing_disable()
    model.eval().save_pretrained(f"{folder}-again")
    again = AutoModelForCausalLM.from_pretrained(f"{folder}-again", trust_remote_code=True)
    with torch.no_grad():
        checks["saved_again"] = (again(tokens).logits - out["logits"]).abs().max().item()
    save_file({key: value.contiguous() for key, value in out.items()}, f"{root}/{name}.out.safetensors")
    json.dump(checks, open(f"{root}/{name}.json", "w"))
"""


@pytest.fixture(scope="module")
def results(pruned, tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    save_file({"tokens": TOKENS}, root / "tokens.safetensors")
    expected = {}
    for family, granularity in CASES:
        dense, database = pruned(family, granularity)
        plan = uneven_plan(database.space(dense.sites), granularity)
        cuts = database.cuts(dense.sites, plan, dense.device)
        model = build_model(dense.config, dense.sites, dense.weights, cuts)
        export_hf(model, dense, {"levels": plan}, "# card\n", root / f"{family}-{granularity}")
        with torch.no_grad():
            expected[family, granularity] = model(TOKENS).logits, model.model(TOKENS).last_hidden_state
    names = ",".join(f"{family}-{granularity}" for family, granularity in CASES)
    script = root / "use.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [PYTHON, "-W", "error::UserWarning", str(script), str(root), names, str(NEW)],
        cwd=root,
        env={
            "HF_HOME": str(root / "home"),
            "HF_HUB_OFFLINE": "1",
            "PATH": "",
            "HOME": str(root),
            "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"],
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root, expected


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def result(request, results):
    root, expected = results
    name = "-".join(request.param)
    outputs = load_file(root / f"{name}.out.safetensors")
    return root / name, outputs, json.loads((root / f"{name}.json").read_text()), expected[request.param]


def test_saved_model_logits(result):
    _, outputs, _, (logits, hidden) = result
    assert torch.allclose(outputs["logits"], logits, atol=1e-4)
    assert torch.allclose(outputs["eager"], logits, atol=1e-4)
    assert torch.allclose(outputs["headless"], hidden, atol=1e-4)
    assert torch.allclose(outputs["last_hidden"], hidden, atol=1e-4)


def test_saved_model_generation_independent_of_cache(result):
    _, outputs, _, _ = result
    assert outputs["cached"].shape == (3, 12 + NEW)
    assert torch.equal(outputs["cached"], outputs["uncached"])
    assert torch.equal(outputs["cached"], outputs["static"])
    assert torch.equal(outputs["beams"], outputs["beams_uncached"])


def test_saved_model_left_padding(result):
    _, outputs, _, _ = result
    assert torch.equal(outputs["left_padded"][0, -NEW:], outputs["alone"][0, -NEW:])


def test_saved_model_trained_and_saved_again(result):
    _, _, checks, _ = result
    assert checks["checkpointing"] < 1e-5
    assert checks["saved_again"] == 0


def test_saved_folder_files(result):
    folder, _, checks, _ = result
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == f"modeling_darwinlm.{config['architectures'][0]}"
    assert config["pruned"]["per_layer_config"]
    names = {file.name for file in folder.iterdir()}
    assert {"model.safetensors", "generation_config.json", "tokenizer.json", "plan.json", "README.md"} <= names
    assert [name for name in names if name.endswith(".py")] == ["modeling_darwinlm.py"]
    assert checks["tokenizer"] == [64, 65] or len(checks["tokenizer"]) == 2
    assert "message.content" in checks["template"]


TOKENIZER = "from transformers import AutoTokenizer; print(len(AutoTokenizer.from_pretrained({folder!r})), 'tokens')"


@pytest.mark.slow
def test_tokenizer_loads_on_terminal_without_prompt(result, checkpoint):
    """On a terminal, AutoTokenizer asks whether it may run the code of a folder, and waits for an answer."""
    command = [PYTHON, "-c", TOKENIZER.format(folder=str(result[0]))]
    terminal, end = pty.openpty()
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(result[0]), "COLUMNS": "200"}
    with subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=environment) as process:
        os.close(end)
        said = b""
        with contextlib.suppress(OSError):  # end of the terminal
            while part := os.read(terminal, 1000):
                said += part
                assert b"[y/N]" not in said
    os.close(terminal)
    assert process.returncode == 0
    dense = AutoTokenizer.from_pretrained(checkpoint(result[0].name.split("-")[0]))
    assert said.decode().splitlines() == [f"{len(dense)} tokens"]


def test_tokenizer_saved_differently_is_reported(result, checkpoint, caplog):
    dense = AutoTokenizer.from_pretrained(checkpoint(result[0].name.split("-")[0]))
    _check_tokenizer(dense, result[0])
    assert not caplog.messages
    dense.add_tokens(["café"])
    _check_tokenizer(dense, result[0])
    assert len(caplog.messages) == 1 and "gives other tokens): use the dense model's tokenizer" in caplog.messages[0]


def test_saved_model_not_loadable_without_code(result, tmp_path):
    """Loading fails even if only whole parts are removed, so that all tensors would fit."""
    with pytest.raises(KeyError, match="this model is pruned: load it with trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(result[0])
    config = make_config("llama")
    config.per_layer_config = {0: {"skip": ["mlp"]}}
    save_pruned(config, tmp_path)
    with pytest.raises(KeyError, match="this model is pruned: load it with trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)


def test_tokenizer_class_of_transformers_4(result):
    settings = json.loads((result[0] / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] in ("PreTrainedTokenizerFast", "Qwen2Tokenizer")


def test_removed_sites_and_tied_heads_not_stored(result):
    folder, _, _, _ = result
    tensors = load_file(folder / "model.safetensors")
    assert not any(name.startswith("model.layers.0.self_attn") for name in tensors)
    assert "model.layers.0.input_layernorm.weight" not in tensors
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert ("lm_head.weight" in tensors) == (not tied)


def test_load_refuses_other_folders(result, tmp_path, checkpoint):
    folder, _, _, (logits, _) = result
    with torch.no_grad():
        assert torch.allclose(darwinlm.load(folder)(TOKENS).logits, logits, atol=1e-4)
    with pytest.raises(darwinlm.UserError, match="contains no model"):
        darwinlm.load(tmp_path)
    with pytest.raises(darwinlm.UserError, match="contains no pruned model"):
        darwinlm.load(checkpoint("llama"))


def test_saved_model_keeps_sliding_window(pruned):
    dense, _ = pruned("mistral", "kv_group")
    assert dense.config.sliding_window == 8
    long = torch.randint(0, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(3))
    other = long.clone()
    other[0, 0] = (other[0, 0] + 1) % VOCABULARY
    with torch.no_grad():
        change = (dense.model(long).logits - dense.model(other).logits).abs()[0].amax(-1)
    # Three layers with a window of 8 reach exactly 3 * 7 positions back.
    assert change[:22].min() > 0
    assert change[22:].max() == 0
