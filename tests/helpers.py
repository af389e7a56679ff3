"""Helpers: tiny random checkpoints of every family, settings of a short run, damaging and comparing files."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from darwinlm.models.cutting import build_model
from darwinlm.models.families import causal_lm, dense_config
from darwinlm.models.modeling_darwinlm import PrunedConfig, PrunedModel

transformers.utils.logging.disable_progress_bar()

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
GRANULARITIES = ("kv_group", "query_head")
VOCABULARY = 259

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "initializer_range": 0.2,
}
_HYBRID = {
    "head_dim": 8, "layer_types": ["full_attention", "linear_attention", "full_attention"],
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_SHARED = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
}  # fmt: skip
OWN_SETTINGS = {
    "llama": {"model_type": "llama", "head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "head_dim": 8, "sliding_window": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "ministral3": {"head_dim": 8, "sliding_window": 8},
    "ministral": {"head_dim": 8, "sliding_window": 8},
    "cwm": {"head_dim": 8, "sliding_window": 8},
    "vaultgemma": {"head_dim": 8, "sliding_window": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 4},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "olmo3": {"sliding_window": 8},
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": 2},
    "cohere": {"logit_scale": 2.0, "use_qk_norm": True},
    "cohere2": {"sliding_window": 8, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": 8},
    "starcoder2": {"sliding_window": 8},
    "qwen3_moe": {
        "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "mixtral": {"head_dim": 8, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "granitemoe": {
        "num_local_experts": 6, "num_experts_per_tok": 2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
        "attention_multiplier": 0.3, "logits_scaling": 2.0,
    },
    "gpt_oss": {
        "head_dim": 8, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 8, "swiglu_limit": 0.5,
    },
    "qwen2_moe": {**_SHARED, "mlp_only_layers": [1]},
    "qwen3_next": {**_HYBRID, **_SHARED},
    "qwen3_5_moe_text": {**_HYBRID, **_SHARED, "num_experts": 8},
    "qwen3_5_text": _HYBRID,
}  # fmt: skip
"""Smallest settings that exercise what is special to each family."""


SETTINGS: dict[str, Any] = {
    "data.sequence_length": 16,
    "data.calibration_tokens": 256,
    "data.train_tokens": 128,
    "data.validation_tokens": 64,
    "data.test_tokens": 64,
    "database.levels": 4,
    "search.generations": 2,
    "search.offspring": 3,
    "search.survivors": [2, 1],
    "search.trial_tokens": [16, 32],
    "search.score_tokens": [32, 64],
    "recovery.tokens": 64,
    "workload.prompt_tokens": 8,
    "workload.new_tokens": 2,
}
TARGET = 0.7


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Create a tokenizer of bytes, which needs no download and encodes any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{% for message in messages %}{{ message.content }}{% endfor %}",
    )


def make_config(family: str, **changes: Any) -> PrunedConfig:
    """Create the dense config that pruning `family` starts from."""
    settings = {**SIZES, "model_type": family, **OWN_SETTINGS.get(family, {}), **changes}
    return dense_config(transformers.AutoConfig.for_model(settings.pop("model_type"), **settings))


_SCALES = {
    **dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), 8),
    **dict.fromkeys(("q_proj.weight", "k_proj.weight", "gate_proj.weight"), 1 / 8),
    "v_proj.weight": 1 / 2,
    "v_proj.bias": 4,
    "o_proj.weight": 1 / 4,
    "up_proj.weight": 1 / 4,
    "up_proj.bias": 2,
    "down_proj.weight": 1 / 2,
}


def rescaled(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rescale weights without changing the function by a bit: all factors are powers of two."""
    return {name: tensor * _SCALES.get(".".join(name.split(".")[-2:]), 1) for name, tensor in weights.items()}


def save_pruned(config: PrunedConfig, folder: Path) -> PrunedModel:
    """Save a model with the sizes of `config` and random parameters, as a folder that `darwinlm.load` reads."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = causal_lm(config)._from_config(config).eval()
        randomise(model)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def randomise(model: torch.nn.Module) -> None:
    """Randomize biases and norms too."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)


def make_checkpoint(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a checkpoint in which all parameters are random, including biases and norms."""
    settings = {**SIZES, "model_type": family, **OWN_SETTINGS.get(family, {}), **changes}
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng():
        torch.manual_seed(FAMILIES.index(family) if family in FAMILIES else 0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        randomise(model)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def halved(dense, database, **kwargs):
    """Build a model whose sites are alternately at levels 1 and 2 of their database."""
    plan = [1 + i % 2 for i in range(len(dense.sites))]
    return build_model(
        dense.config, dense.sites, dense.weights, database.cuts(dense.sites, plan, dense.device), **kwargs
    )


def uneven_plan(space, granularity):
    """Return a plan that removes the attention of the first layer and the MLP of another; other levels differ."""
    plan = [1 + i % 2 for i in range(len(space.sites))]
    plan[0], plan[3] = len(space.sites[0].units) - 1, len(space.sites[3].units) - 1
    return plan


def native_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def mask(native, site, cut, weight):
    """Mask the native model as the cut does: refitted columns are kept, all others are zero."""
    output = native.get_submodule(site.output)
    masked = torch.zeros_like(weight)
    if cut.kept:
        columns = [u * site.columns_per_unit + c for u in cut.kept for c in range(site.columns_per_unit)]
        masked[:, columns] = cut.output_weight
    elif output.bias is not None:
        output.bias.data.zero_()
    output.weight.data = masked


def apart(models: tuple[torch.nn.Module, torch.nn.Module], start: torch.nn.Module) -> float:
    """Return the distance of two models relative to the first one's distance from `start`."""
    one, other, begin = (torch.nn.utils.parameters_to_vector(model.parameters()).detach() for model in (*models, start))
    return float((one - other).norm() / (one - begin).norm())


CLOCKS = ("manifest.json", "measured.json", "metrics.json", "index.html", "README.md", "recipe.yaml", "lock")


def uninstall(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the version of `package`, as if it were not installed."""
    right = importlib.metadata.version

    def version(name: str) -> str:
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return right(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files that must be identical in all runs: all without timings."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in CLOCKS
    }


def cut_short(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def delete(file):
    file.unlink()


DAMAGES = (cut_short, flip_a_bit, delete)
