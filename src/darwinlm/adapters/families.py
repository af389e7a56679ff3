"""Model families as data: which modules of transformers' own layers form each site, and which of their rows a unit has.

A family lists names. How large the tensors are, which have biases, and whether queries and keys have norms is read from
a layer built without memory.
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

from darwinlm.adapters.modeling_darwinlm import PREFIX, PrunedConfig, make_layer, pruned_class
from darwinlm.errors import UserError
from darwinlm.plan import SiteKind

Granularity = Literal["kv_group", "query_head"]
ExpertUnit = Literal["whole", "channels"]

LAYERS = "model.layers."
"""What the names of all tensors in layers begin with."""
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The names that modules have in a layer."""

    attention: str = "self_attn"
    queries_keys_values: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Within `attention`; one name where they are rows of one tensor, in this order."""
    attention_output: str = "o_proj"
    mlp: str = "mlp"
    mlp_inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    """Within `mlp`; one tensor with two rows a channel holds the gates first."""
    mlp_output: str = "down_proj"
    experts: str = ""
    """Within `mlp`, the module that holds the tensors of all experts, in layers that have such; none if empty."""
    router: str = "gate"
    """Within `mlp`, what sends tokens to experts."""
    experts_transposed: bool = False
    """Whether the matrices of experts have a row for each input, and one channel's gate and up follow one another."""
    before_attention: str = "input_layernorm"
    """The norm whose output attention reads; none if empty."""
    after_attention: str = ""
    """The norm of what attention adds to the stream; none if empty."""
    before_mlp: str = "post_attention_layernorm"
    """The same as `before_attention` where attention and MLP read the same stream, in parallel."""
    after_mlp: str = ""

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP read the same stream."""
        return self.before_mlp == self.before_attention != ""

    @property
    def parts(self) -> dict[str, list[str]]:
        """The modules of a layer that go with each part; the first computes, the others are norms of its own."""
        attention = (self.attention, "" if self.parallel else self.before_attention, self.after_attention)
        mlp = (self.mlp, "" if self.parallel else self.before_mlp, self.after_mlp)
        return {"attention": [name for name in attention if name], "mlp": [name for name in mlp if name]}

    def output(self, kind: SiteKind) -> str:
        """The output projection of a part, within a layer."""
        attention, mlp = f"{self.attention}.{self.attention_output}", f"{self.mlp}.{self.mlp_output}"
        return attention if kind == "attention" else mlp

    def norm_after(self, kind: SiteKind) -> str:
        """The norm of what a part adds to the stream; none if empty."""
        return self.after_attention if kind == "attention" else self.after_mlp

    @property
    def reads_after_attention(self) -> str:
        """The module whose input is the stream between attention and MLP; none if empty."""
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
"""By `model_type`."""


def family_of(config: Any) -> Family:
    """The family of a config. Raises UserError that names the supported ones."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"model type {config.model_type!r} is not supported; supported families: {', '.join(sorted(FAMILIES))}"
        )
    return family


def dense_config(config: Any) -> PrunedConfig:
    """A config of transformers as one that sizes can be set in, layer by layer."""
    if isinstance(config, PrunedConfig):
        return config
    settings = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    known: PrunedConfig = config_class(config.model_type).from_dict(settings)
    known.layer_parts = family_of(config).parts
    for name, value in settings.items():
        if isinstance(value, float) and name.endswith(("dropout", "pdrop")):
            # A trial is a few steps: what they teach must not hang on what is dropped. Llama and its like have none.
            setattr(known, name, 0.0)
    if getattr(known, "output_router_logits", False):
        # Transformers' load-balancing loss, computed with it, knows one number of experts for all layers.
        known.output_router_logits = False
    if getattr(known, "head_dim", None) is None:
        # Of a layer with fewer heads it could not be told any more.
        known.head_dim = known.hidden_size // known.num_attention_heads
    if getattr(known, "num_key_value_heads", None) is None:
        known.num_key_value_heads = known.num_attention_heads
    set_attention(known)
    return known


def window_of(config: Any, layer: int) -> int | None:
    """How many tokens attention sees in a layer; None if all."""
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is None or kinds[layer] == "sliding_attention"
    window: int | None = getattr(config, "sliding_window", None) if sliding else None
    return window


def config_class(model_type: str) -> Any:
    """The class of configs of pruned models of that type."""
    kind: Any = CONFIG_MAPPING[model_type]
    return pruned_class(kind)


def has_attention(config: PrunedConfig, layer: int) -> bool:
    """Whether a layer has attention with a KV cache; in hybrid models, some have linear attention instead."""
    kinds = getattr(config, "layer_types", None)
    return "attention" not in config.skipped(layer) and not (kinds and kinds[layer] == "linear_attention")


def is_hybrid(config: PrunedConfig) -> bool:
    """Whether some layers have linear attention."""
    return "linear_attention" in (getattr(config, "layer_types", None) or ())


def sites_needed(config: PrunedConfig, sites: Sequence["Site"]) -> set[str]:
    """The sites that cannot be removed whole: mixtures, of whose experts a token needs some; in hybrid models, whose
    caches tell by attention how many tokens they hold, the first attention."""
    attention = [site.name for site in sites if site.kind == "attention"]
    return set(attention[:1] if is_hybrid(config) else ()) | {site.name for site in sites if site.routed}


def expert_setting(config: PrunedConfig) -> str:
    """The setting that says how many experts a layer has."""
    return next(name for name in ("num_local_experts", "num_experts") if name in vars(config))


def expert_width_setting(config: PrunedConfig) -> str:
    """The setting that says how many channels each expert of a layer has."""
    return next(name for name in ("moe_intermediate_size", "intermediate_size") if name in vars(config))


def experts_in(config: PrunedConfig, layer: int) -> int:
    """How many experts a layer has; 0 if its MLP is no mixture."""
    family = family_of(config)
    if not family.experts or f"{family.mlp}.{family.experts}" not in dict(empty_layer(config, layer).named_modules()):
        return 0
    return int(getattr(config.layer(layer), expert_setting(config)))


def set_attention(config: PrunedConfig) -> None:
    """Have models with `config` attend by PyTorch's function, where their family can."""
    config._attn_implementation = "sdpa" if causal_lm(config)._supports_sdpa else "eager"
    if family_of(config).experts and not torch.cuda.is_available():
        # A layer by itself would ask for it, and transformers would warn that nobody has said it.
        config._experts_implementation = "eager"


def causal_lm(config: PrunedConfig) -> Any:
    """The class of models with such a config."""
    return pruned_class(MODEL_FOR_CAUSAL_LM_MAPPING[config.made_of])


def auto_map(config: PrunedConfig, module: str) -> dict[str, str]:
    """By auto class, the class in the file `module` for a model with `config`, as `config.json` says it."""
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
    """A decoder layer on the meta device."""
    with torch.device("meta"):
        return make_layer(layer_class(config), config, layer)


def layer_class(config: PrunedConfig) -> Any:
    """The class of transformers' decoder layers."""
    return _classes(config)[0]


def rotary_embedding(config: PrunedConfig) -> Any:
    """Transformers' module that makes rotary embeddings, on the CPU."""
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
    """Rows of a tensor that are lost, `rows` at a time: they go with the last of the units that need them.

    Of the tensors of all experts, which have a dimension for each of them first, rows along another dimension.
    """

    tensor: str
    rows: int
    start: int = 0
    """The first of these rows; in other rows of the same tensor is something else."""
    serves: tuple[int, ...] = ()
    """By unit, which `rows` rows it needs, ascending; empty where each unit has its own."""
    norm: bool = False
    """Whether this is the weight of a norm over all these rows at once: where some go, it divides by another mean."""
    dim: int = 0
    """The dimension that they are along."""
    step: int = 1
    """How far from one to the next of these rows, where others lie between them."""

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
    """In the order that they have in a tensor, where several are in one."""
    whole: tuple[str, ...]
    """Tensors kept as they are until the last unit goes: norms, an output bias."""
    num_units: int
    columns_per_unit: int
    heads_per_unit: int = 0
    """Query heads in a unit; 0 in an MLP."""
    kv_heads: tuple[int, ...] = ()
    """By unit, the KV head that it needs; empty in an MLP."""
    routed: int = 0
    """Of a mixture of experts, how many of them a token goes to. Else 0."""
    experts: int = 0
    """Of a mixture whose units are channels, how many experts there are; unit k is the one of rank k by importance in
    each of them. 0 where a unit is an expert, of which at least `routed` stay, and where there are none."""
    output_dim: int = 1
    """The dimension of the output projection that units are along."""
    size: str = "intermediate_size"
    """The setting of a layer that says how many units its MLP has."""

    @property
    def of_experts(self) -> bool:
        """Whether a unit is an expert."""
        return self.routed > 0 and self.experts == 0

    def columns(self, units: int) -> int:
        """Columns of the output projection, or of those of all experts, that so many units have."""
        return units * self.columns_per_unit * max(1, self.experts)

    @property
    def output_tensor(self) -> str:
        """The name of the tensor that loses columns, or experts."""
        return self.output if self.routed else f"{self.output}.weight"

    @property
    def tensors(self) -> dict[str, None]:
        """The names of all its tensors, each once."""
        return dict.fromkeys((*self.whole, *(rows.tensor for rows in self.inputs), self.output_tensor))


def find_sites(config: PrunedConfig, granularity: Granularity, expert_unit: ExpertUnit = "whole") -> tuple[Site, ...]:
    """Every site of a model, attention before MLP, layer by layer; of one that is pruned already, those it still has.

    Raises:
        UserError: if KV heads that serve different numbers of query heads are to be units.
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
    """The config of the model that a pruned one was cut from: layers of one size, none of them without a part."""
    whole = copy.deepcopy(config)
    whole.per_layer_config = None
    return whole


def _attention(
    config: PrunedConfig, layer: int, shapes: Mapping[str, tuple[int, ...]], granularity: Granularity
) -> Site:
    family, head_dim, sizes = family_of(config), config.head_dim, config.layer(layer)
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

    prefix = f"{LAYERS}{layer}."
    heads, (queries, *others) = sizes.num_attention_heads, family.queries_keys_values
    inputs, whole = list[Rows](), list[str]()

    def add(name: str, count: int, start: int = 0, *, keys: bool, norm: bool = False) -> None:
        """`count` rows from `start` on, of all query heads or of all KV heads."""
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
            # Queries, keys and values in one tensor.
            add(name, heads * head_dim, keys=False)
            add(name, kv_heads * head_dim, heads * head_dim, keys=True)
            add(name, kv_heads * head_dim, (heads + kv_heads) * head_dim, keys=True)
        elif module in (queries, *others):
            add(name, shape[0], keys=module != queries)
        elif shape == (head_dim,):
            whole.append(prefix + name)  # a norm that all heads have in common
        else:
            # A norm over all heads at once, or (two dimensions) one for each.
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
            whole.append(name)  # an output bias
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
    # A shared expert is a small part of a layer, and every token needs it: it stays as it is.
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
            # Experts that lie the other way round have gate and up of a channel side by side.
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
    """The tensors of the norms that go with a part."""
    return (name for name in shapes if name.rpartition(".")[0] in config.layer_parts[kind][1:])
