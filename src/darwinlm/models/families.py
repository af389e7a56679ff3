"""Model families as data: which modules of transformers' layers form each site, and which rows belong to a unit.

A family only lists names. Tensor sizes, biases, and norms of queries and keys are read from a layer on the meta device.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from darwinlm.errors import UserError
from darwinlm.models.modeling_darwinlm import PREFIX, PrunedConfig, make_layer, pruned_class
from darwinlm.plan import SiteKind

Granularity = Literal["kv_group", "query_head"]
ExpertUnit = Literal["whole", "channels"]

LAYERS = "model.layers."
"""Prefix of the names of all tensors in layers."""
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Names of the modules in a layer."""

    attention: str = "self_attn"
    queries_keys_values: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Modules within `attention`; a single name if queries, keys and values are rows of one tensor, in this order."""
    attention_output: str = "o_proj"
    mlp: str = "mlp"
    mlp_inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    """Modules within `mlp`; a single fused tensor holds the gates first."""
    mlp_output: str = "down_proj"
    experts: str = ""
    """Module within `mlp` that holds the fused tensors of all experts, in layers that have experts; empty if there are
    none."""
    router: str = "gate"
    """Module within `mlp` that routes tokens to experts."""
    experts_transposed: bool = False
    """Whether the experts' matrices have a row per input, with gate and up of a channel interleaved."""
    before_attention: str = "input_layernorm"
    """Norm before attention; empty if there is none."""
    after_attention: str = ""
    """Norm of attention's output, before it is added to the stream; empty if there is none."""
    before_mlp: str = "post_attention_layernorm"
    """Norm before the MLP; equal to `before_attention` if attention and MLP read the same stream, in parallel."""
    after_mlp: str = ""

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP read the same stream."""
        return self.before_mlp == self.before_attention != ""

    @property
    def parts(self) -> dict[str, list[str]]:
        """Modules of a layer that belong to each part: first the part itself, then its norms."""
        attention = (self.attention, "" if self.parallel else self.before_attention, self.after_attention)
        mlp = (self.mlp, "" if self.parallel else self.before_mlp, self.after_mlp)
        return {"attention": [name for name in attention if name], "mlp": [name for name in mlp if name]}

    def output(self, kind: SiteKind) -> str:
        """Return the output projection of a part, within a layer."""
        attention, mlp = f"{self.attention}.{self.attention_output}", f"{self.mlp}.{self.mlp_output}"
        return attention if kind == "attention" else mlp

    def norm_after(self, kind: SiteKind) -> str:
        """Return the norm of a part's output, before it is added to the stream; empty if there is none."""
        return self.after_attention if kind == "attention" else self.after_mlp

    @property
    def reads_after_attention(self) -> str:
        """Module whose input is the stream between attention and MLP; empty if there is none."""
        return "" if self.parallel else self.before_mlp or self.mlp


_SANDWICH = Family(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_NORM_AFTER = Family(
    before_attention="",
    after_attention="post_attention_layernorm",
    before_mlp="",
    after_mlp="post_feedforward_layernorm",
)
_PARALLEL = Family(before_mlp="input_layernorm")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "ministral3", "qwen2", "qwen3", "seed_oss", "ernie4_5"), Family()),
    **dict.fromkeys(("ministral", "hunyuan_v1_dense", "smollm3", "granite", "gemma", "olmo"), Family()),
    **dict.fromkeys(("cwm", "qwen3_5_text"), Family()),
    **dict.fromkeys(("gemma2", "gemma3_text"), _SANDWICH),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), _NORM_AFTER),
    **dict.fromkeys(("cohere", "cohere2"), _PARALLEL),
    **dict.fromkeys(("nemotron", "arcee", "jais2"), Family(mlp_inputs=("up_proj",))),
    **dict.fromkeys(("qwen3_moe", "mixtral", "olmoe"), Family(experts="experts")),
    **dict.fromkeys(("qwen2_moe", "qwen3_next", "qwen3_5_moe_text"), Family(experts="experts")),
    "granitemoe": Family(mlp="block_sparse_moe", experts="experts", router="router"),
    "gpt_oss": Family(experts="experts", router="router", experts_transposed=True),
    "phi3": Family(queries_keys_values=("qkv_proj",), mlp_inputs=("gate_up_proj",)),
    "phi": Family(
        attention_output="dense", mlp_inputs=("fc1",), mlp_output="fc2", before_mlp="input_layernorm"
    ),
    "starcoder2": Family(mlp_inputs=("c_fc",), mlp_output="c_proj"),
    "vaultgemma": Family(before_mlp="pre_feedforward_layernorm"),
    "glm": Family(mlp_inputs=("gate_up_proj",)),
    "glm4": Family(
        mlp_inputs=("gate_up_proj",), after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"
    ),
}  # fmt: skip
"""Families by `model_type`."""


def family_of(config: Any) -> Family:
    """Return the family of a config. Raises UserError that lists the supported families."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"model type {config.model_type!r} is not supported; supported families: {', '.join(sorted(FAMILIES))}"
        )
    return family


def dense_config(config: Any) -> PrunedConfig:
    """Convert a transformers config to one that supports sizes per layer."""
    if isinstance(config, PrunedConfig):
        return config
    settings = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    known: PrunedConfig = config_class(config.model_type).from_dict(settings)
    known.layer_parts = family_of(config).parts
    for name, value in settings.items():
        if isinstance(value, float) and name.endswith(("dropout", "pdrop")):
            # Trials are too short for dropout; Llama and similar families have none.
            setattr(known, name, 0.0)
    if getattr(known, "output_router_logits", False):
        # Enables transformers' load-balancing loss, which supports only one number of experts for all layers.
        known.output_router_logits = False
    if getattr(known, "head_dim", None) is None:
        # It could not be inferred in a layer with fewer heads.
        known.head_dim = known.hidden_size // known.num_attention_heads
    if getattr(known, "num_key_value_heads", None) is None:
        known.num_key_value_heads = known.num_attention_heads
    set_attention(known)
    return known


def window_of(config: Any, layer: int) -> int | None:
    """Return the number of tokens that attention sees in a layer; None if all."""
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is None or kinds[layer] == "sliding_attention"
    window: int | None = getattr(config, "sliding_window", None) if sliding else None
    return window


def config_class(model_type: str) -> Any:
    """Return the config class of pruned models of that type."""
    kind: Any = CONFIG_MAPPING[model_type]
    return pruned_class(kind)


def has_attention(config: PrunedConfig, layer: int) -> bool:
    """Whether a layer has attention with a KV cache; some layers of hybrid models have linear attention instead."""
    kinds = getattr(config, "layer_types", None)
    return "attention" not in config.skipped(layer) and not (kinds and kinds[layer] == "linear_attention")


def is_hybrid(config: PrunedConfig) -> bool:
    """Whether some layers have linear attention."""
    return "linear_attention" in (getattr(config, "layer_types", None) or ())


def sites_needed(config: PrunedConfig, sites: Sequence["Site"]) -> set[str]:
    """Return the sites that cannot be removed completely: mixtures, since tokens need some experts; and the first
    attention of hybrid models, whose caches get their length from it."""
    attention = [site.name for site in sites if site.kind == "attention"]
    return set(attention[:1] if is_hybrid(config) else ()) | {site.name for site in sites if site.routed}


def expert_setting(config: PrunedConfig) -> str:
    """Return the setting for the number of experts in a layer."""
    return next(name for name in ("num_local_experts", "num_experts") if name in vars(config))


def expert_width_setting(config: PrunedConfig) -> str:
    """Return the setting for the number of channels in each expert."""
    return next(name for name in ("moe_intermediate_size", "intermediate_size") if name in vars(config))


def experts_in(config: PrunedConfig, layer: int) -> int:
    """Return the number of experts in a layer; 0 if its MLP is not a mixture."""
    family = family_of(config)
    if not family.experts or f"{family.mlp}.{family.experts}" not in dict(empty_layer(config, layer).named_modules()):
        return 0
    return int(getattr(config.layer(layer), expert_setting(config)))


def set_attention(config: PrunedConfig) -> None:
    """Use PyTorch's scaled_dot_product_attention in models with `config`, if their family supports it."""
    config._attn_implementation = "sdpa" if causal_lm(config)._supports_sdpa else "eager"
    if family_of(config).experts and not torch.cuda.is_available():
        # Set explicitly, because transformers warns about the default.
        config._experts_implementation = "eager"


def causal_lm(config: PrunedConfig) -> Any:
    """Return the model class for such a config."""
    return pruned_class(MODEL_FOR_CAUSAL_LM_MAPPING[config.made_of])


def auto_map(config: PrunedConfig, module: str) -> dict[str, str]:
    """Return the `auto_map` of `config.json`: by auto class, the class in `module` for a model with `config`."""
    tables: dict[str, Any] = {
        "AutoModel": MODEL_MAPPING,
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
        "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "AutoModelForTokenClassification": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    }
    base = config.made_of
    kinds = {"AutoConfig": base} | {name: table[base] for name, table in tables.items() if base in table}
    return {name: f"{module}.{PREFIX}{kind.__name__}" for name, kind in kinds.items()}


def empty_layer(config: PrunedConfig, layer: int) -> Any:
    """Create a decoder layer on the meta device."""
    with torch.device("meta"):
        return make_layer(layer_class(config), config, layer)


def layer_class(config: PrunedConfig) -> Any:
    """Return transformers' decoder layer class."""
    return _classes(config)[0]


def rotary_embedding(config: PrunedConfig) -> Any:
    """Create transformers' rotary embedding module, on the CPU."""
    with torch.device("cpu"):
        return _classes(config)[1](config=config)


def _classes(config: PrunedConfig) -> tuple[Any, Any]:
    base = config.made_of
    if base not in _KNOWN_CLASSES:
        one = dense_again(config)
        one.num_hidden_layers = 1
        with torch.device("meta"):
            decoder: Any = pruned_class(MODEL_MAPPING[base])._from_config(one)
        _KNOWN_CLASSES[base] = type(decoder.layers[0]), type(getattr(decoder, "rotary_emb", None))
    return _KNOWN_CLASSES[base]


_KNOWN_CLASSES: dict[type, tuple[type, type]] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows of a tensor that are removed with units, in groups of `rows`: a group is removed with the last unit that
    needs it.

    In the fused tensors of all experts, whose first dimension is the expert, rows are along another dimension.
    """

    tensor: str
    rows: int
    start: int = 0
    """First of these rows; other rows of the same tensor belong to something else."""
    serves: tuple[int, ...] = ()
    """Group of `rows` rows that each unit needs, ascending; empty if each unit has its own group."""
    norm: bool = False
    """Whether this is the weight of a norm over all these rows at once, whose mean changes when rows are removed."""
    dim: int = 0
    """Dimension along which the rows are removed."""
    step: int = 1
    """Distance between consecutive rows, if others are interleaved."""

    def kept(self, units: Sequence[int]) -> list[int]:
        """Return the groups of `rows` rows that these units need, ascending."""
        return sorted({self.serves[unit] for unit in units} if self.serves else units)


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A place where units can be removed. The tensors named here shrink together."""

    name: str
    """Name of the site, such as `layers.3.mlp`."""
    layer: int
    kind: SiteKind
    output: str
    """Module whose weight loses columns, such as `model.layers.3.mlp.down_proj`."""
    inputs: tuple[Rows, ...]
    """Rows that shrink with the units; several in one tensor are in its order."""
    whole: tuple[str, ...]
    """Tensors kept unchanged until the last unit is removed: norms, an output bias."""
    num_units: int
    columns_per_unit: int
    heads_per_unit: int = 0
    """Query heads per unit; 0 in an MLP."""
    kv_heads: tuple[int, ...] = ()
    """KV head of each unit; empty in an MLP."""
    routed: int = 0
    """Number of experts per token in a mixture, otherwise 0."""
    experts: int = 0
    """Number of experts in a mixture whose units are channels; unit k is the channel of rank k by importance in each
    expert. 0 if a unit is an expert, of which at least `routed` are kept, or if there are no experts."""
    output_dim: int = 1
    """Dimension of the output projection along which units are removed."""
    size: str = "intermediate_size"
    """Layer setting for the number of units in its MLP."""

    @property
    def of_experts(self) -> bool:
        """Whether a unit is an expert."""
        return self.routed > 0 and self.experts == 0

    def columns(self, units: int) -> int:
        """Return the number of columns of the output projection (over all experts) for `units` units."""
        return units * self.columns_per_unit * max(1, self.experts)

    @property
    def output_tensor(self) -> str:
        """Name of the tensor that loses columns, or experts."""
        return self.output if self.routed else f"{self.output}.weight"

    @property
    def tensors(self) -> dict[str, None]:
        """Names of all tensors of the site, each once."""
        return dict.fromkeys((*self.whole, *(rows.tensor for rows in self.inputs), self.output_tensor))


def find_sites(config: PrunedConfig, granularity: Granularity, expert_unit: ExpertUnit = "whole") -> tuple[Site, ...]:
    """Return every site of a model, attention before MLP, layer by layer; for a pruned model, its remaining sites.

    Raises:
        UserError: if `kv_group` units would have different numbers of query heads.
    """
    found: list[Site] = []
    for layer in range(config.num_hidden_layers):
        module = empty_layer(config, layer)
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        names, skipped = dict(module.named_modules()), config.skipped(layer)
        family = family_of(config)
        if "attention" not in skipped and family.attention in names:
            found.append(_attention(config, layer, shapes, granularity))
        if "mlp" not in skipped and family.experts and f"{family.mlp}.{family.experts}" in names:
            found.append((_experts if expert_unit == "whole" else _expert_channels)(config, layer, shapes))
        elif "mlp" not in skipped and family.mlp in names:
            found.append(_mlp(config, layer, shapes))
    return tuple(found)


def dense_again(config: PrunedConfig) -> PrunedConfig:
    """Return the config of the original model of a pruned one: all layers complete and of the same size."""
    whole = copy.deepcopy(config)
    whole.per_layer_config = None
    return whole


def _attention(
    config: PrunedConfig, layer: int, shapes: Mapping[str, tuple[int, ...]], granularity: Granularity
) -> Site:
    family, head_dim, sizes = family_of(config), config.head_dim, config.layer(layer)
    kv_heads = sizes.num_key_value_heads
    # Query heads per KV head.
    groups = sizes.query_heads_per_kv_head or [sizes.num_attention_heads // kv_heads] * kv_heads
    if len(groups) != kv_heads or sum(groups) != sizes.num_attention_heads or min(groups) < 1:
        raise UserError(
            f"layer {layer}: {kv_heads} KV heads cannot serve {sizes.num_attention_heads} query heads as in "
            f"config.json ({', '.join(map(str, groups))}); download the whole model"
        )
    served: tuple[int, ...]
    if granularity == "kv_group":
        if len(set(groups)) > 1:
            raise UserError(
                f"layer {layer} has KV heads that serve {', '.join(map(str, groups))} query heads, but units "
                "must have the same size; set database.granularity=query_head"
            )
        heads_per_unit, served = groups[0], tuple(range(kv_heads))
    else:
        heads_per_unit, served = 1, tuple(kv_head for kv_head, heads in enumerate(groups) for _ in range(heads))

    prefix = f"{LAYERS}{layer}."
    heads, (queries, *others) = sizes.num_attention_heads, family.queries_keys_values
    inputs, whole = list[Rows](), list[str]()

    def add(name: str, count: int, start: int = 0, *, keys: bool, norm: bool = False) -> None:
        """Add `count` rows from `start` on, of all query heads or of all KV heads."""
        rows = count // kv_heads if keys else count // heads * heads_per_unit
        inputs.append(Rows(tensor=prefix + name, rows=rows, start=start, serves=served if keys else (), norm=norm))

    for name, shape in shapes.items():
        module, _, kind = name.removeprefix(f"{family.attention}.").rpartition(".")
        if not name.startswith(f"{family.attention}."):
            continue
        if module == family.attention_output:
            whole += [prefix + name] if kind == "bias" else []
        elif kind == "sinks":
            add(name, shape[0], keys=False)
        elif module == queries and not others:
            # Queries, keys and values in one fused tensor.
            add(name, heads * head_dim, keys=False)
            add(name, kv_heads * head_dim, heads * head_dim, keys=True)
            add(name, kv_heads * head_dim, (heads + kv_heads) * head_dim, keys=True)
        elif module in (queries, *others):
            add(name, shape[0], keys=module != queries)
        elif shape == (head_dim,):
            whole.append(prefix + name)  # A norm shared by all heads.
        else:
            # A norm over all heads at once, or (two dimensions) one per head.
            add(name, shape[0], keys=module.startswith("k"), norm=len(shape) == 1)
    return Site(
        name=f"layers.{layer}.attention",
        layer=layer,
        kind="attention",
        output=prefix + family.output("attention"),
        inputs=tuple(inputs),
        whole=tuple(whole + [prefix + name for name in _norms(config, layer, shapes, "attention")]),
        num_units=len(served),
        columns_per_unit=heads_per_unit * head_dim,
        heads_per_unit=heads_per_unit,
        kv_heads=served,
    )


def _mlp(config: PrunedConfig, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> Site:
    family, prefix = family_of(config), f"{LAYERS}{layer}."
    output = family.output("mlp")
    width = shapes[f"{output}.weight"][1]
    inputs, whole = list[Rows](), list[str]()
    for name, shape in shapes.items():
        module, _, _ = name.rpartition(".")
        if module in {f"{family.mlp}.{one}" for one in family.mlp_inputs}:
            inputs += [Rows(tensor=prefix + name, rows=1, start=start) for start in range(0, shape[0], width)]
        elif name.startswith(f"{family.mlp}.") and name != f"{output}.weight":
            whole.append(name)  # An output bias.
    return Site(
        name=f"layers.{layer}.mlp",
        layer=layer,
        kind="mlp",
        output=prefix + output,
        inputs=tuple(inputs),
        whole=tuple(prefix + name for name in (*whole, *_norms(config, layer, shapes, "mlp"))),
        num_units=width,
        columns_per_unit=1,
    )


def _experts(config: PrunedConfig, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> Site:
    family, prefix = family_of(config), f"{LAYERS}{layer}."
    output = f"{family.mlp}.{family.experts}.down_proj"
    experts, *matrix = shapes[output]
    # A shared expert is small and used by every token, so it is kept unchanged.
    by_expert = tuple(f"{family.mlp}.{name}." for name in (family.router, family.experts))
    others = [name for name in shapes if name.startswith(f"{family.mlp}.") and not name.startswith(by_expert)]
    return Site(
        name=f"layers.{layer}.mlp",
        layer=layer,
        kind="mlp",
        output=prefix + output,
        inputs=tuple(
            Rows(tensor=prefix + name, rows=1) for name in shapes if name.startswith(by_expert) and name != output
        ),
        whole=tuple(prefix + name for name in (*others, *_norms(config, layer, shapes, "mlp"))),
        num_units=experts,
        columns_per_unit=matrix[0 if family.experts_transposed else 1],
        routed=config.num_experts_per_tok,
        output_dim=0,
        size=expert_setting(config),
    )


def _expert_channels(config: PrunedConfig, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> Site:
    family, prefix = family_of(config), f"{LAYERS}{layer}."
    output = f"{family.mlp}.{family.experts}.down_proj"
    experts, *matrix = shapes[output]
    width = matrix[0 if family.experts_transposed else 1]
    inputs, whole = list[Rows](), list[str]()
    for name, shape in shapes.items():
        if name.startswith(f"{family.mlp}.{family.experts}.gate_up_proj"):
            # Transposed experts interleave gate and up of each channel.
            dim = len(shape) - 1 if family.experts_transposed else 1
            step = 2 if family.experts_transposed else 1
            starts = (0, 1 if family.experts_transposed else width)
            inputs += [Rows(tensor=prefix + name, rows=1, start=start, dim=dim, step=step) for start in starts]
        elif name.startswith(f"{family.mlp}.") and name != output:
            whole.append(name)
    return Site(
        name=f"layers.{layer}.mlp",
        layer=layer,
        kind="mlp",
        output=prefix + output,
        inputs=tuple(inputs),
        whole=tuple(prefix + name for name in (*whole, *_norms(config, layer, shapes, "mlp"))),
        num_units=width,
        columns_per_unit=1,
        routed=config.num_experts_per_tok,
        experts=experts,
        output_dim=1 if family.experts_transposed else 2,
        size=expert_width_setting(config),
    )


def _norms(config: PrunedConfig, layer: int, shapes: Mapping[str, tuple[int, ...]], kind: SiteKind) -> Iterator[str]:
    """Return the tensors of the norms that belong to a part."""
    return (name for name in shapes if name.rpartition(".")[0] in config.layer_parts[kind][1:])
