"""The computation of a model's layers in terms that engines share, and its tensors under Llama's names.

Engines implement certain forms of layers. Many families differ from one of them only in the layout of tensors: several
projections fused in one tensor, rotary embeddings of neighboring pairs, or of only a part of each head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from darwinlm.errors import UserError
from darwinlm.models.families import LAYERS, Family, dense_again, empty_layer, family_of, rotary_embedding
from darwinlm.models.heads import logit_settings
from darwinlm.models.modeling_darwinlm import PrunedConfig

_PLAIN = ("llama", "mistral", "ministral", "qwen2", "qwen3", "seed_oss", "cwm", "phi3", "granite", "smollm3")
_NEIGHBOURS = ("ernie4_5", "glm", "glm4")
"""Model types whose rotary embedding rotates rows 2i and 2i + 1 of a head together; others rotate i and i + rotated/2.
"""
_OFFSET_NORMS = ("gemma", "gemma3_text")
"""Model types whose norms multiply by 1 + their weight."""
_NORMS_AFTER = ("olmo2", "olmo3", "exaone4")
_KNOWN = (*_PLAIN, *_NEIGHBOURS, *_OFFSET_NORMS, *_NORMS_AFTER)
"""Model types fully described by a `Form`: with RMS norms and gated MLPs."""

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rope types whose angles do not depend on the length of the text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What all layers of a model have in common, except sizes and rope."""

    activation: str
    """Activation function of the gates: `silu` or `gelu_pytorch_tanh`."""
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: Literal["none", "head", "all"]
    """Norms of queries and keys: per head, or over all heads at once."""
    norm_before: bool
    """Whether attention and MLP each read the stream through a norm."""
    norm_after: bool
    """Whether the outputs of attention and MLP go through a norm before they are added to the stream."""
    norm_offset: float
    """Addend of all norm weights."""
    attention_scale: float
    """Factor of query-key products."""
    embedding_scale: float
    residual_scale: float
    """Factor of the outputs of attention and MLP."""
    logit_scale: float
    logit_softcap: float | None

    @property
    def biases(self) -> list[str]:
        """Names of the bias groups that are present."""
        return [name for name in ("qkv_bias", "attention_output_bias", "mlp_bias") if getattr(self, name)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary embedding of a layer: pair i of a head, rows i and i + head_dim / 2 of the tensors of `layer_tensors`, is
    rotated by the angle `position * turns[i]`."""

    turns: tuple[float, ...]
    """Angle per position of each of head_dim / 2 pairs; 0 for pairs that are not rotated."""
    scaling: float
    """Factor of the rotated rows."""
    settings: Mapping[str, Any]
    """Rope settings of transformers: `rope_type`, `rope_theta`, …"""


def read_form(config: PrunedConfig, engine: str) -> Form:
    """Return the form of a model's layers. Raises UserError if a `Form` cannot describe it."""
    kind = config.model_type
    if kind not in _KNOWN:
        raise UserError(
            f"{engine} cannot run a {kind} model whose layers differ in size: it has no equivalent layers; "
            f"{'' if family_of(config).experts else 'export --to vllm, or '}prune with --set "
            "search.uniform=true and export --to hf-native"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise UserError(f"{engine} does not support the attention softcap of a {kind} model (attn_logit_softcapping)")
    family, layer = family_of(config), empty_layer(dense_again(config), 0)
    attention, names = getattr(layer, family.attention), layer.state_dict()
    norm = names.get(f"{family.attention}.q_norm.weight")
    scale, softcap = logit_settings(config)
    return Form(
        activation=getattr(config, "hidden_activation", None) or config.hidden_act,
        qkv_bias=f"{family.attention}.{family.queries_keys_values[0]}.bias" in names,
        attention_output_bias=f"{family.output('attention')}.bias" in names,
        mlp_bias=f"{family.output('mlp')}.bias" in names,
        qk_norm="none" if norm is None else "head" if norm.shape == (config.head_dim,) else "all",
        norm_before=family.before_attention != "",
        norm_after=family.after_attention != "",
        norm_offset=float(kind in _OFFSET_NORMS),
        attention_scale=float(attention.scaling),
        embedding_scale=_embedding_scale(config),
        residual_scale=float(getattr(config, "residual_multiplier", 1)),
        logit_scale=scale,
        logit_softcap=softcap,
    )


def _embedding_scale(config: PrunedConfig) -> float:
    gemma = config.model_type in _OFFSET_NORMS
    return float(config.hidden_size**0.5 if gemma else getattr(config, "embedding_multiplier", 1))


def read_rope(config: PrunedConfig, layer: int) -> Rope | None:
    """Return the rotary embedding of a layer; None if it has none."""
    kinds: Any = getattr(config, "layer_types", None)
    unturned = getattr(config, "no_rope_layers", None)
    if unturned and not unturned[layer]:
        return None
    if config.model_type == "exaone4" and config.sliding_window and kinds[layer] != "sliding_attention":
        return None
    rotary, settings = rotary_embedding(config), config.rope_parameters
    prefix = f"{kinds[layer]}_" if kinds and hasattr(rotary, f"{kinds[layer]}_inv_freq") else ""
    turned: list[float] = getattr(rotary, f"{prefix}inv_freq").tolist()
    return Rope(
        turns=tuple(turned + [0.0] * (config.head_dim // 2 - len(turned))),
        scaling=float(getattr(rotary, f"{prefix}attention_scaling")),
        settings=settings[kinds[layer]] if prefix else settings,
    )


def layer_tensors(config: PrunedConfig, weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Return the tensors of a layer by their names in Llama's layer, such as `self_attn.q_proj.weight`.

    Norms of the outputs of attention and MLP are `attention_output_norm.weight` and `mlp_output_norm.weight`. Values
    are those of the model; meta tensors give meta tensors.

    Args:
        config: config of the pruned model.
        weights: its state dict.
        layer: index of the layer.
    """
    family, prefix, sizes = family_of(config), f"{LAYERS}{layer}.", config.layer(layer)
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.startswith(prefix):
            module, _, kind = name.removeprefix(prefix).rpartition(".")
            for renamed, part in _split(family, sizes, config.head_dim, module, tensor):
                found[f"{renamed}.{kind}"] = part
    order = _row_order(config, layer)
    if order is not None:
        for name, tensor in found.items():
            if name.split(".")[1] in ("q_proj", "k_proj", "q_norm", "k_norm"):
                rows = tensor.unflatten(0, (-1, config.head_dim))
                found[name] = rows[:, order.to(tensor.device)].flatten(0, 1)
    return found


def _split(family: Family, sizes: Any, head_dim: int, module: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Split or rename a tensor of the module `module` as in Llama's layer."""
    queries, *others = family.queries_keys_values
    heads, kv_heads = sizes.num_attention_heads * head_dim, sizes.num_key_value_heads * head_dim
    renamed = {
        family.output("attention"): "self_attn.o_proj",
        family.output("mlp"): "mlp.down_proj",
        family.before_attention: "input_layernorm",
        family.after_attention: "attention_output_norm",
        family.before_mlp: "post_attention_layernorm",
        family.after_mlp: "mlp_output_norm",
    }
    if module == f"{family.attention}.{queries}" and not others:
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        return list(zip(names, tensor.split((heads, kv_heads, kv_heads)), strict=True))
    if module == f"{family.mlp}.{family.mlp_inputs[0]}" and len(family.mlp_inputs) == 1:
        return list(zip(("mlp.gate_proj", "mlp.up_proj"), tensor.chunk(2), strict=True))
    return [(renamed.get(module, module), tensor)]


def _row_order(config: PrunedConfig, layer: int) -> Tensor | None:
    """Return the order of a head's rows in the model's tensors such that rope rotates rows i and i + head_dim / 2
    together; None if that is already the case."""
    rope, head_dim = read_rope(config, layer), config.head_dim
    if rope is None:
        return None
    turned = 2 * sum(turn != 0 for turn in rope.turns)
    neighbours = config.model_type in _NEIGHBOURS
    if not neighbours and turned == head_dim:
        return None
    rows, rest = torch.arange(turned), torch.arange(turned, head_dim)
    pairs = rows.unflatten(0, (-1, 2)) if neighbours else rows.unflatten(0, (2, -1)).T
    return torch.cat([pairs, rest.unflatten(0, (-1, 2))]).T.flatten()
