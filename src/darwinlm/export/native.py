"""A folder of transformers' own model, without any code in it: for models whose layers are all of one size."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from darwinlm.adapters.families import COPIED, FAMILIES
from darwinlm.adapters.modeling_darwinlm import DarwinLMConfig, DarwinLMForCausalLM
from darwinlm.errors import UserError
from darwinlm.export.card import without_code
from darwinlm.export.hf import SHARD, copy_rest
from darwinlm.export.shapes import LayerShape, check_equal_groups, kept_layers, layer_shapes

_SIZES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def native_config(config: DarwinLMConfig) -> Any:
    """The config of the same model in transformers' own words.

    Layers without any part are left out. A Llama whose heads no longer divide its hidden size becomes a Mistral, which
    is the same function: transformers' Llama refuses such sizes.

    Raises:
        UserError: if the layers differ in size, or no model of transformers has such sizes.
    """
    check_equal_groups(config, "transformers' own models")
    kept = kept_layers(config)
    shape = _common_shape(config, kept)
    kind = config.base_model_type
    if kind == "llama" and config.hidden_size % shape.heads:
        biased = [name for name in ("qkv_bias", "attention_output_bias", "mlp_bias") if getattr(config, name)]
        if biased:
            raise UserError(
                f"{shape.heads} heads do not divide the hidden size {config.hidden_size}, which transformers' Llama "
                f"asks for, and its Mistral, which does not, has no biases ({biased[0]}); use --to gguf or vllm"
            )
        kind = "mistral"
    settings = {name: getattr(config, name) for name in COPIED if name not in _SIZES}
    settings |= {
        attribute: getattr(config, name)
        for name in ("qkv_bias", "attention_output_bias", "mlp_bias")
        if isinstance(attribute := getattr(FAMILIES[kind], name), str)
    }
    layer_types = [config.layer_types[index] for index in kept]
    window = config.sliding_window if "sliding_attention" in layer_types else None
    settings |= {"sliding_window": window} if kind == "mistral" else {}
    if kind.startswith("qwen"):
        settings |= {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": layer_types}
    return AutoConfig.for_model(
        kind,
        **settings,
        num_hidden_layers=len(kept),
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.width,
        head_dim=config.head_dim,
    )


def write_native(model: DarwinLMForCausalLM, native: Any, source: Path, folder: Path) -> None:
    """Write `model`, loaded from `source`, with the config `native` to `folder`, with everything else in `source`."""
    config = cast(DarwinLMConfig, model.config)
    tensors: dict[str, Tensor] = model.state_dict()
    for number, index in enumerate(kept_layers(config)):
        # In rising order: a layer only ever moves to a place that is free.
        old, new = f"model.layers.{index}.", f"model.layers.{number}."
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)
    native.dtype = model.dtype
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(native)
    whole.load_state_dict(tensors, assign=True)
    whole.tie_weights()
    whole.save_pretrained(folder, max_shard_size=SHARD)
    copy_rest(source, folder, ("config.json", "README.md"))
    if (source / "README.md").exists():
        card = (source / "README.md").read_text(encoding="utf-8")
        (folder / "README.md").write_text(without_code(card), encoding="utf-8")


def _common_shape(config: DarwinLMConfig, kept: list[int]) -> LayerShape:
    """The one size of all layers. Raises UserError that names two which differ."""
    shapes = layer_shapes(config)
    first = shapes[kept[0]]
    for index in kept:
        if shapes[index] != first or not (first.heads and first.width):
            raise UserError(
                f"the layers differ in size, or lack a part ({_words(kept[0], first)}; "
                f"{_words(index, shapes[index])}), which transformers' own models cannot have; use --to gguf or vllm, "
                "or prune with --set search.uniform=true"
            )
    return first


def _words(index: int, shape: LayerShape) -> str:
    return f"layer {index}: {shape.heads} query and {shape.kv_heads} KV heads, {shape.width} MLP channels"
