"""Model families as data: which switches of the modelling file a family sets, and which weights form each site."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from darwinlm.adapters.modeling_darwinlm import DarwinLMConfig
from darwinlm.errors import UserError
from darwinlm.plan import SiteKind

Granularity = Literal["kv_group", "query_head"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What distinguishes a family. A string names the attribute of its config that decides."""

    qkv_bias: bool | str = False
    attention_output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    """RMS norms on queries and keys, one weight vector of head_dim shared by all heads."""


FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", attention_output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qkv_bias="attention_bias", attention_output_bias="attention_bias", qk_norm=True),
}

COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("use_cache", "tie_word_embeddings", "rope_parameters", "attention_dropout"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
"""Settings that have the same name in every family and in ours."""


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config. Raises UserError that names the supported ones."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"model type {config.model_type!r} is not supported; supported families: {', '.join(sorted(FAMILIES))}"
        )
    return family


def dense_config(config: Any) -> DarwinLMConfig:
    """The dense model's config in the words of our modelling file."""
    family = family_of(config)
    switches = {
        name: getattr(config, value) if isinstance(value, str) else value
        for name in ("qkv_bias", "attention_output_bias", "mlp_bias", "qk_norm")
        for value in [getattr(family, name)]
    }
    sliding_window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        layer_types = ["sliding_attention" if sliding_window else "full_attention"] * config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DarwinLMConfig(
        **{name: getattr(config, name) for name in COPIED},
        **switches,
        head_dim=head_dim,
        sliding_window=sliding_window if "sliding_attention" in layer_types else None,
        layer_types=list(layer_types),
        base_model_type=config.model_type,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """A tensor that loses rows, `rows` at a time: they go with the last of the units that need them."""

    tensor: str
    rows: int
    serves: tuple[int, ...] = ()
    """By unit, which `rows` rows it needs, ascending; empty where each unit has its own."""

    def kept(self, units: Sequence[int]) -> list[int]:
        """Which groups of `rows` rows the units `units` need, ascending."""
        return sorted({self.serves[unit] for unit in units} if self.serves else units)


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A place where units can be removed. The tensors named here shrink together."""

    name: str
    """`layers.3.mlp`"""
    layer: int
    kind: SiteKind
    output: str
    """The module whose weight loses columns: `model.layers.3.mlp.down_proj`."""
    inputs: tuple[Rows, ...]
    whole: tuple[str, ...]
    """Tensors kept as they are until the last unit goes: the norm, an output bias, q/k norms."""
    num_units: int
    columns_per_unit: int
    heads_per_unit: int = 0
    """Query heads in a unit; 0 in an MLP."""
    kv_heads: tuple[int, ...] = ()
    """By unit, the KV head that it needs; empty in an MLP."""


def find_sites(config: DarwinLMConfig, granularity: Granularity) -> tuple[Site, ...]:
    """Every site of a model, attention before MLP, layer by layer; of one that is pruned already, those it still has.

    Raises:
        UserError: if KV heads that serve different numbers of query heads are to be units.
    """
    found = []
    for layer in range(config.num_hidden_layers):
        skipped = config.skipped(layer)
        if "attention" not in skipped:
            found.append(_attention(config, layer, granularity))
        if "mlp" not in skipped:
            found.append(_mlp(config, layer))
    return tuple(found)


def dense_again(config: DarwinLMConfig) -> DarwinLMConfig:
    """The config of the model that a pruned one was cut from: layers of one size, none of them without a part."""
    whole = copy.deepcopy(config)
    whole.per_layer_config = None
    return whole


def _attention(config: DarwinLMConfig, layer: int, granularity: Granularity) -> Site:
    prefix = f"model.layers.{layer}"
    attention, head_dim, sizes = f"{prefix}.self_attn", config.head_dim, config.per_layer_config[layer]
    kv_heads = sizes.num_key_value_heads
    # Query heads of each KV head.
    groups = sizes.query_heads_per_kv_head or [sizes.num_attention_heads // kv_heads] * kv_heads
    if len(groups) != kv_heads or sum(groups) != sizes.num_attention_heads or min(groups) < 1:
        raise UserError(
            f"layer {layer}: {kv_heads} KV heads cannot serve {sizes.num_attention_heads} query heads as config.json "
            f"says ({', '.join(map(str, groups))}); get the whole model"
        )
    served: tuple[int, ...]
    if granularity == "kv_group":
        if len(set(groups)) > 1:
            raise UserError(
                f"layer {layer} has KV heads that serve {', '.join(map(str, groups))} query heads, and units "
                "are of one size; set database.granularity=query_head"
            )
        heads_per_unit, served = groups[0], tuple(range(kv_heads))
    else:
        heads_per_unit, served = 1, tuple(kv_head for kv_head, heads in enumerate(groups) for _ in range(heads))
    kinds = ("weight", "bias") if config.qkv_bias else ("weight",)
    return Site(
        name=f"layers.{layer}.attention",
        layer=layer,
        kind="attention",
        output=f"{attention}.o_proj",
        inputs=tuple(
            Rows(tensor=f"{attention}.{module}.{kind}", rows=rows, serves=serves)
            for module, rows, serves in (
                ("q_proj", heads_per_unit * head_dim, ()),
                ("k_proj", head_dim, served),
                ("v_proj", head_dim, served),
            )
            for kind in kinds
        ),
        whole=(
            f"{prefix}.input_layernorm.weight",
            *([f"{attention}.o_proj.bias"] if config.attention_output_bias else []),
            *([f"{attention}.q_norm.weight", f"{attention}.k_norm.weight"] if config.qk_norm else []),
        ),
        num_units=len(served),
        columns_per_unit=heads_per_unit * head_dim,
        heads_per_unit=heads_per_unit,
        kv_heads=served,
    )


def _mlp(config: DarwinLMConfig, layer: int) -> Site:
    prefix = f"model.layers.{layer}"
    kinds = ("weight", "bias") if config.mlp_bias else ("weight",)
    return Site(
        name=f"layers.{layer}.mlp",
        layer=layer,
        kind="mlp",
        output=f"{prefix}.mlp.down_proj",
        inputs=tuple(
            Rows(tensor=f"{prefix}.mlp.{module}.{kind}", rows=1)
            for module in ("gate_proj", "up_proj")
            for kind in kinds
        ),
        whole=(
            f"{prefix}.post_attention_layernorm.weight",
            *([f"{prefix}.mlp.down_proj.bias"] if config.mlp_bias else []),
        ),
        num_units=config.per_layer_config[layer].intermediate_size,
        columns_per_unit=1,
    )
