"""Folders of transformers' own models, without code: for models whose layers all have the same size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from darwinlm.errors import UserError
from darwinlm.export.card import without_code
from darwinlm.export.engine import Engine, Export
from darwinlm.export.form import read_form
from darwinlm.export.hf import SHARD, copy_rest
from darwinlm.export.proof import logits_of
from darwinlm.export.shapes import LayerShape, check_equal_groups, kept_layers, layer_shapes
from darwinlm.models.families import (
    LAYERS,
    dense_again,
    expert_setting,
    expert_width_setting,
    family_of,
    has_attention,
)
from darwinlm.models.loading import some_layers
from darwinlm.models.modeling_darwinlm import PrunedConfig, PrunedModel

_OF_MISTRAL = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "hidden_act", "max_position_embeddings"),
    *("initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings", "rope_parameters"),
    *("attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id"),
)
"""Settings that Llama and Mistral have in common."""


def native_config(config: PrunedConfig) -> Any:
    """Return the config of the same model for transformers' own classes.

    Layers without any part are omitted. A Llama whose heads no longer divide its hidden size becomes a Mistral, which
    computes the same function: transformers' Llama rejects such sizes.

    Raises:
        UserError: if the layers differ in size, or no model of transformers supports these sizes.
    """
    check_equal_groups(config, "transformers' own models")
    kept = kept_layers(config)
    sizes = _common_sizes(config, kept)
    kind, settings = config.model_type, some_layers(dense_again(config), kept).to_dict()
    heads = sizes["num_attention_heads"]
    if kind == "llama" and config.hidden_size % heads:
        biases = read_form(config, "transformers' Llama").biases
        if biases:
            raise UserError(
                f"{heads} heads do not divide the hidden size {config.hidden_size}, as transformers' Llama "
                f"requires, and its Mistral, which does not require it, has no biases ({biases[0]}); use --to "
                "gguf or vllm"
            )
        kind = "mistral"
        settings = {name: value for name, value in settings.items() if name in _OF_MISTRAL} | {"sliding_window": None}
    settings |= sizes
    left_out = ("model_type", "layer_parts", "architectures", "auto_map", "_name_or_path", "transformers_version")
    try:
        return AutoConfig.for_model(kind, **{name: value for name, value in settings.items() if name not in left_out})
    except Exception as error:  # Transformers' config validation raises many kinds of errors.
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"transformers' {kind} rejects these sizes ({reason}); use --to vllm") from None


def write_native(model: PrunedModel, native: Any, source: Path, folder: Path) -> None:
    """Write `model`, loaded from `source`, with the config `native` to `folder`, with all other files of `source`."""
    config = cast(PrunedConfig, model.config)
    tensors: dict[str, Tensor] = model.state_dict()
    for number, index in enumerate(kept_layers(config)):
        # In ascending order, so that a layer only moves to a free place.
        old, new = f"{LAYERS}{index}.", f"{LAYERS}{number}."
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)
    native.dtype = model.dtype
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(native)
    try:
        whole.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise UserError(
            f"transformers' {native.model_type} does not support layers of these sizes ({reason})"
        ) from None
    whole.tie_weights()
    whole.save_pretrained(folder, max_shard_size=SHARD)
    copy_rest(source, folder, ("config.json", "README.md"))
    if (source / "README.md").exists():
        card = (source / "README.md").read_text(encoding="utf-8")
        (folder / "README.md").write_text(without_code(card), encoding="utf-8")


def _common_sizes(config: PrunedConfig, kept: list[int]) -> dict[str, int]:
    """Return the size settings shared by all layers: by those with and without experts, and by all that have attention.
    Raises UserError that names two layers which differ."""
    shapes = layer_shapes(config)
    attending = next((index for index in kept if has_attention(config, index)), kept[0])
    first = shapes[attending]
    found: dict[str, int] = {"num_attention_heads": first.heads, "num_key_value_heads": first.kv_heads}
    alike: dict[bool, int] = {}
    for index in kept:
        shape = shapes[index]
        same_kind = shapes[alike.setdefault(shape.experts > 0, index)]
        same_mlp = (shape.width, shape.experts) == (same_kind.width, same_kind.experts)
        same_heads = (shape.heads, shape.kv_heads) == (first.heads, first.kv_heads)
        linear = shape.heads > 0 and not has_attention(config, index)
        if not same_mlp or not (same_heads or linear) or not (shape.heads and shape.width):
            others = "" if family_of(config).experts else "use --to gguf or vllm, or "
            raise UserError(
                f"the layers differ in size, or a part is missing ({_words(attending, first)}; "
                f"{_words(index, shape)}), which transformers' own models do not support; {others}prune with "
                "--set search.uniform=true"
            )
        if shape.experts:
            found |= {expert_setting(config): shape.experts, expert_width_setting(config): shape.width}
        else:
            found["intermediate_size"] = shape.width
    return found


def _words(index: int, shape: LayerShape) -> str:
    experts = f", {shape.experts} experts" if shape.experts else ""
    return f"layer {index}: {shape.heads} query and {shape.kv_heads} KV heads, {shape.width} MLP channels{experts}"


def _write(export: Export, draft: Path) -> dict[str, Any]:
    native = native_config(export.config)
    write_native(export.model, native, export.source, draft)
    return {"model_type": native.model_type}


def _logits(_: Export, draft: Path, tokens: Sequence[int]) -> np.ndarray:
    return logits_of(AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32, trust_remote_code=False), tokens)


ENGINE = Engine(
    name="hf-native",
    suffix="-native",
    check_export=lambda export: native_config(export.config),
    write=_write,
    logits=_logits,
)
