"""Sites of a model: the attention or the MLP of a layer, and which rows and columns belong to a unit.

Tensor sizes, biases, and norms of queries and keys are read from a layer on the meta device.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from darwinlm.errors import UserError
from darwinlm.models.families import (
    LAYERS,
    empty_layer,
    expert_setting,
    expert_width_setting,
    family_of,
    is_hybrid,
)
from darwinlm.models.modeling_darwinlm import PrunedConfig
from darwinlm.plan import SiteKind

Granularity = Literal["kv_group", "query_head"]
ExpertUnit = Literal["whole", "channels"]


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


def sites_needed(config: PrunedConfig, sites: Sequence[Site]) -> set[str]:
    """Return the sites that cannot be removed completely: mixtures, since tokens need some experts; and the first
    attention of hybrid models, whose caches get their length from it."""
    attention = [site.name for site in sites if site.kind == "attention"]
    return set(attention[:1] if is_hybrid(config) else ()) | {site.name for site in sites if site.routed}


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
