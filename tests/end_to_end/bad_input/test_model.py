"""Tests of models that cannot be pruned."""

import json
import re
import shutil

import huggingface_hub.constants
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize("model", ["./nothing", "/nowhere/at/all", "owner/nothing", "a/b/c", "not a name?", "x" * 300])
def test_model_not_found(model, refused):
    refused(f"model '{re.escape(model)}': not a local folder, and not found on the Hub", model=model)


def test_sequence_length_exceeds_context(refused):
    refused(
        r"data\.sequence_length=256 exceeds the model's maximum of 128 positions",
        settings=["data.sequence_length=256", "data.validation_tokens=256", "data.train_tokens=512"],
    )


def test_tokenizer_exceeds_embeddings(refused, checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    config_of(folder, vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=None)

    def shorten(weights):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = weights[name][:100].clone()

    weights_of(folder, shorten)
    refused(r"its tokenizer produces the id \d+, but it has only 100 embeddings", model=folder)


def config_of(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def weights_of(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def set_one(weights, value):
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value


def only_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded(folder, index):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only_gguf(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")


def only_adapter(folder, settings):
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"lora_A": torch.ones(2)}, folder / "adapter_model.safetensors")


FAMILIES = "supported families: arcee, cohere, [a-z0-9_, ]+, vaultgemma$"
UP = r"model\.layers\.1\.mlp\.up_proj\.weight"
MODELS = {
    "empty folder": (
        lambda d: [f.unlink() for f in d.iterdir()],
        "has no config.json with a model_type; give a folder",
    ),
    "only a GGUF": (
        only_gguf,
        r"contains GGUF files \(.*\), which are not supported; give the folder or Hub id",
    ),
    "LoRA adapter": (
        lambda d: only_adapter(d, {"base_model_name_or_path": "owner/base", "peft_type": "LORA"}),
        r"is a LoRA adapter of 'owner/base', not a whole model; merge it into its base model \(PEFT",
    ),
    "LoRA adapter of nothing": (lambda d: only_adapter(d, []), "is a LoRA adapter, not a whole model; merge it"),
    "MLX in 4 bits": (
        lambda d: config_of(d, quantization={"group_size": 64, "bits": 4}),
        "is quantized to 4 bits for MLX; use the original unquantized checkpoint",
    ),
    "config no JSON": (
        lambda d: (d / "config.json").write_text("{"),
        r"its config.json cannot be read: .*config\.json",
    ),
    "config a list": (lambda d: (d / "config.json").write_text("[1]"), "has no config.json with a model_type"),
    "words for a number": (
        lambda d: config_of(d, hidden_size="big"),
        "config.json cannot be used: .*'hidden_size' exp",
    ),
    "unsupported family": (
        lambda d: config_of(d, model_type="gpt2"),
        f"model type 'gpt2' is not supported; {FAMILIES}",
    ),
    "unheard-of family": (lambda d: config_of(d, model_type="foo"), f"model type 'foo' is not supported; {FAMILIES}"),
    "encoder": (
        lambda d: config_of(d, model_type="bert", architectures=["BertModel"]),
        f"model type 'bert' .*{FAMILIES}",
    ),
    "remote code": (
        lambda d: config_of(d, model_type="foo", auto_map={"AutoConfig": "code.Config"}),
        f"model type 'foo' is not supported; {FAMILIES}",
    ),
    "classifier": (
        lambda d: config_of(d, architectures=["LlamaForSequenceClassification"]),
        r"is a LlamaForSequenceClassification, not a causal language model \(…ForCausalLM\)",
    ),
    "GPTQ": (
        lambda d: config_of(d, quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantized; use the original unquantized checkpoint",
    ),
    "MXFP4": (
        lambda d: config_of(d, quantization_config={"quant_method": "mxfp4"}),
        r"is quantized \(MXFP4\); convert it to bfloat16 with transformers and give that folder",
    ),
    "GGUF in the config": (
        lambda d: config_of(d, quantization_config={"quant_method": "gguf"}),
        "is quantized; use the original unquantized checkpoint",
    ),
    "unknown activation": (
        lambda d: config_of(d, hidden_act="foo"),
        "config.json.*: KeyError: 'foo'",
    ),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        r"weights cannot be loaded: no model.safetensors \(only safetensors files are supported; convert GGUF",
    ),
    "only pickled weights": (
        only_pickle,
        r"weights cannot be loaded: .*convert .* pickled .bin files, which can run code\)",
    ),
    "cut weights": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:5_000]),
        r"model.safetensors cannot be read \(.*\); download the whole checkpoint",
    ),
    "a shard too few": (
        lambda d: sharded(d, {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}),
        r"model-00002-of-00002.safetensors cannot be read \(.*\); download the whole checkpoint",
    ),
    "a shard from elsewhere": (
        lambda d: sharded(d, {"weight_map": {"lm_head.weight": "../other.safetensors"}}),
        r"model.safetensors.index.json cannot be read \(it lists files outside its folder.*\); download the whole",
    ),
    "an index of nothing": (lambda d: sharded(d, []), "model.safetensors.index.json cannot be read .*; download the"),
    "a weight too few": (
        lambda d: weights_of(d, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        f"its files are missing {UP}; download the whole checkpoint",
    ),
    "a layer too few": (
        lambda d: config_of(d, num_hidden_layers=4),
        r"its files are missing model\.layers\.3\.self_attn\.q_proj\.weight and \d+ more weights; download",
    ),
    "another shape": (
        lambda d: config_of(d, intermediate_size=32),
        r"model\.layers\.0\.mlp\.gate_proj\.weight has shape \[64, 48\] in its files, but .* implies \[32, 48\]",
    ),
    "NaN": (lambda d: weights_of(d, lambda w: set_one(w, torch.nan)), f"{UP} contains NaN or Inf; repair the"),
    "Inf": (lambda d: weights_of(d, lambda w: set_one(w, torch.inf)), f"{UP} contains NaN or Inf; repair the"),
    "no layers": (
        lambda d: config_of(d, num_hidden_layers=0),
        r"num_hidden_layers=0 in its config.json must be 1 to 10,000$",
    ),
    "layers without end": (
        lambda d: config_of(d, num_hidden_layers=10**12),
        r"num_hidden_layers=1000000000000 in its config.json must be 1 to 10,000$",
    ),
    "no heads": (lambda d: config_of(d, num_attention_heads=0), "config.json"),
    "a negative size": (lambda d: config_of(d, intermediate_size=-1), "config.json"),
    "a size without end": (lambda d: config_of(d, hidden_size=10**30), "config.json"),
    "an unknown rotation": (lambda d: config_of(d, rope_parameters={"rope_type": "foo"}), "config.json"),
    "a rotation of words": (lambda d: config_of(d, rope_parameters="fast"), "config.json"),
    "layer types of another length": (lambda d: config_of(d, layer_types=["full_attention"]), "config.json"),
    "whole numbers for a type": (lambda d: config_of(d, dtype="int8"), "dtype torch.int8 in its config.json is not"),
    "an unknown type": (lambda d: config_of(d, dtype="float99"), "config.json cannot be used: .*float99"),
    "weights of whole numbers": (
        lambda d: weights_of(
            d, lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.ones(64, 48, dtype=torch.int8)})
        ),
        f"{UP} has dtype I8; use the original unquantized checkpoint",
    ),
    "weights of eight bits": (
        lambda d: weights_of(
            d, lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.ones(64, 48).to(torch.float8_e4m3fn)})
        ),
        f"{UP} has dtype F8_E4M3; use the original unquantized checkpoint",
    ),
    "weights that are no weights": (
        lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 64),
        r"model.safetensors cannot be read \(.*\); download the whole checkpoint",
    ),
    "a pickle under another name": (
        lambda d: torch.save({"a": torch.ones(1)}, d / "model.safetensors"),
        r"model.safetensors cannot be read \(.*\); download the whole checkpoint",
    ),
    "a generation config that is a list": (
        lambda d: (d / "generation_config.json").write_text("[1]"),
        "its generation_config.json cannot be used: ",
    ),
    "no tokenizer": (lambda d: [f.unlink() for f in d.glob("token*")], "its tokenizer cannot be loaded: .*tokenizer"),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{"), "its tokenizer cannot be loaded: .*line 1"),
}


@pytest.mark.parametrize("case", MODELS)
def test_invalid_model(case, refused, checkpoint, tmp_path):
    damage, message = MODELS[case]
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    damage(folder)
    refused(f"model '{re.escape(str(folder))}'.*{message}", model=folder)


def test_model_is_a_file(refused, text):
    refused("good.txt' is a file; give a folder in Hugging Face format, or a Hub model id", model=text)
    text.write_bytes(b"GGUF")
    refused(
        r"good.txt' is a GGUF file \(.*\), which is not supported; give the folder or Hub id",
        model=text,
    )


def test_gated_hub_model(refused, monkeypatch):
    def get_config_dict(source):
        # As raised by transformers; creating the cause normally would need a response of the Hub.
        raise OSError("You are trying to access a gated repo.\nMake sure") from GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", get_config_dict)
    refused("access is gated; request it at https://huggingface.co/owner/it, then log in with `hf", model="owner/it")


def test_hub_model_with_pickled_weights(refused, checkpoint, tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "models--owner--it"
    shutil.copytree(checkpoint("llama"), cached / "snapshots" / "1")
    only_pickle(cached / "snapshots" / "1")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    refused("model 'owner/it': its weights cannot be loaded: .*convert GGUF, or pickled .bin", model="owner/it")


def test_unsupported_lm_head(refused, monkeypatch):
    right = transformers.LlamaForCausalLM.forward

    def scaled(*arguments, **named):
        output = right(*arguments, **named)
        output.logits = output.logits * (1 + 2e-4)
        return output

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", scaled)
    refused(r"its LM head is not supported yet \(relative error of its logits: 2.0e-04\)")
