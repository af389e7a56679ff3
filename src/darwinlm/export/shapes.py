"""Sizes of a pruned model's layers, as needed by exports."""

from collections.abc import Sequence
from dataclasses import dataclass

from darwinlm.errors import UserError
from darwinlm.models.families import expert_width_setting, experts_in, family_of, is_hybrid
from darwinlm.models.modeling_darwinlm import PrunedConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """Sizes of a layer; 0 if it does not have the part."""

    heads: int
    kv_heads: int
    width: int
    """Channels of the MLP, or of each of its experts."""
    experts: int = 0
    """Number of experts; 0 if the MLP is not a mixture."""


def layer_shapes(config: PrunedConfig) -> list[LayerShape]:
    """Return the sizes of every layer, in order."""
    shapes = []
    for index in range(config.num_hidden_layers):
        layer, skipped, experts = config.layer(index), config.skipped(index), experts_in(config, index)
        attends = "attention" not in skipped
        width = getattr(layer, expert_width_setting(config) if experts else "intermediate_size")
        shapes.append(
            LayerShape(
                heads=layer.num_attention_heads if attends else 0,
                kv_heads=layer.num_key_value_heads if attends else 0,
                width=0 if "mlp" in skipped else width,
                experts=experts,
            )
        )
    return shapes


def kept_layers(config: PrunedConfig) -> list[int]:
    """Return the layers with any part, and at least one layer, as engines require."""
    return [index for index, shape in enumerate(layer_shapes(config)) if shape.heads or shape.width] or [0]


def check_no_experts(config: PrunedConfig, engine: str) -> None:
    """Reject a mixture of experts. Raises UserError."""
    if family_of(config).experts:
        raise UserError(
            f"{engine} cannot run a {config.model_type} model whose layers differ in size: it supports only one "
            "number of experts for all layers; prune with --set search.uniform=true and export --to hf-native, "
            "which vLLM loads"
        )


def check_no_linear_attention(config: PrunedConfig, engine: str) -> None:
    """Reject a hybrid model. Raises UserError."""
    if is_hybrid(config):
        raise UserError(
            f"{engine} cannot run a {config.model_type} model: exported linear attention only supports texts of "
            "one length; export --to vllm"
        )


def check_equal_groups(config: PrunedConfig, engine: str) -> None:
    """Reject a model in which the KV heads of a layer serve unequal numbers of query heads. Raises UserError."""
    uneven = [
        (index, counts)
        for index in range(config.num_hidden_layers)
        if "attention" not in config.skipped(index)
        and (counts := config.layer(index).query_heads_per_kv_head) is not None
    ]
    if uneven:
        index, counts = uneven[0]
        raise UserError(
            f"layer {index} has KV heads that serve {_words(counts)} query heads, but {engine} only supports "
            "equal numbers; prune with --set database.granularity=kv_group"
        )


def _words(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts[:-1])) + f" and {counts[-1]}"
