"""Cutting: smaller tensors from dense ones, and a model of these. No zeros stand in for removed units."""

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from darwinlm.adapters.families import EMBEDDINGS, HEAD, LAYERS, Rows, Site, causal_lm, empty_layer
from darwinlm.adapters.modeling_darwinlm import PrunedConfig, PrunedModel
from darwinlm.plan import SiteKind

_SIZES: Mapping[SiteKind, Sequence[str]] = {
    "attention": ("num_attention_heads", "num_key_value_heads", "query_heads_per_kv_head"),
    "mlp": ("intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts"),
}
"""Of a layer, in `per_layer_config`."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A site with fewer units: which are kept, and its output projection refitted to them."""

    kept: tuple[int, ...]
    """Unit indices in the dense site, ascending; empty where the whole site is removed."""
    output_weight: Tensor | None
    """(output rows, kept units * columns_per_unit); of a mixture as the model has the tensor of all experts; None where
    the whole site is removed."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """By tensor, what the weight of a norm over all heads is multiplied by: its mean is now that of the heads kept."""
    channels: Tensor | None = None
    """Where units are channels of experts, those that each keeps, ascending: (experts, kept units). None if in each
    expert channel k is unit k."""


def cut_site(site: Site, weights: Mapping[str, Tensor], cut: Cut) -> dict[str, Tensor]:
    """The tensors that are left of `site`, by name; none where the whole site is removed."""
    if not cut.kept:
        return {}
    assert cut.output_weight is not None
    left = {name: weights[name] for name in site.whole}
    rows: dict[str, list[Tensor]] = {}
    if site.experts:
        left |= _cut_experts(site, weights, cut)
    else:
        for some in site.inputs:
            rows.setdefault(some.tensor, []).append(_kept_rows(some, cut.kept, weights[some.tensor].device))
    left |= {name: weights[name].index_select(0, torch.cat(parts)) for name, parts in rows.items()}
    left |= {name: left[name] * factor for name, factor in cut.factors.items()}
    left[site.output_tensor] = cut.output_weight
    return left


def output_columns(site: Site, weight: Tensor, units: Sequence[int]) -> Tensor:
    """What the output projection `weight` of a site has for `units`, not refitted."""
    kept = torch.tensor(units, device=weight.device)
    if site.routed:
        return weight.index_select(site.output_dim, kept)
    columns = kept[:, None] * site.columns_per_unit + torch.arange(site.columns_per_unit, device=weight.device)
    return weight.index_select(1, columns.flatten())


def mean_factor(rows: Rows, units: Sequence[int], shares: Sequence[float]) -> float:
    """What the weight of a norm over all heads is multiplied by once only `units` are left.

    The norm divides by the root of a mean square: before over all groups of rows, now over those kept. `shares` are
    what they have of the sum of squares, on average over tokens.
    """
    kept = rows.kept(units)
    return math.sqrt(sum(shares[group] for group in kept) * len(shares) / len(kept))


def count_parameters(site: Site, shapes: Mapping[str, Sequence[int]], kept: Sequence[int]) -> int:
    """Parameters left in `site` with the units `kept`, its norms included."""
    if not kept:
        return 0
    count = sum(_numel(shapes[name]) for name in site.whole)
    for rows in site.inputs:
        shape = shapes[rows.tensor]
        count += len(rows.kept(kept)) * rows.rows * (_numel(shape) // shape[rows.dim])
    return count + _numel(shapes[site.output_tensor]) // site.num_units * len(kept)


def active_parameters(site: Site, shapes: Mapping[str, Sequence[int]], units: int) -> int:
    """What a token meets of a mixture that keeps so many units: the experts that it goes to, and all of the rest."""
    module = site.output.rpartition(".")[0]
    if site.experts:
        everything = count_parameters(site, shapes, range(units))
        outside = sum(_numel(shapes[name]) for name in site.whole if not name.startswith(f"{module}."))
        return outside + (everything - outside) // site.experts * site.routed
    reached = min(units, site.routed)
    router = (_numel(shapes[rows.tensor][1:]) for rows in site.inputs if not rows.tensor.startswith(f"{module}."))
    return count_parameters(site, shapes, range(reached)) + (units - reached) * sum(router)


def kv_elements(site: Site, kept: Sequence[int], head_dim: int) -> int:
    """Numbers that the site adds to the KV cache for each token: keys and values of its KV heads."""
    return 2 * head_dim * len(_query_heads_by_kv_head(site, kept))


def layer_sizes(site: Site, kept: Sequence[int]) -> dict[str, Any]:
    """The `per_layer_config` entries of `site` with the units `kept`."""
    if not kept:
        return {"skip": [site.kind]}
    if site.kind == "mlp":
        return {site.size: len(kept)}
    per_kv_head = _query_heads_by_kv_head(site, kept)
    return {
        "num_attention_heads": sum(per_kv_head),
        "num_key_value_heads": len(per_kv_head),
        "query_heads_per_kv_head": per_kv_head if len(set(per_kv_head)) > 1 else None,
    }


def pruned_config(config: PrunedConfig, sites: Sequence[Site], cuts: Mapping[str, Cut]) -> PrunedConfig:
    """`config` with the sizes of `cuts` (by site name; a site without an entry stays as it is in `config`)."""
    layers: dict[int | str, dict[str, Any]] = sizes_by_layer(config)
    for site in sites:
        if site.name in cuts:
            kept = cuts[site.name].kept
            sizes = layer_sizes(site, kept)
            layer = layers.setdefault(site.layer, {})
            for name in () if kept else _SIZES[site.kind]:
                layer.pop(name, None)
            skip = [*layer.get("skip", []), *sizes.pop("skip", [])]
            layer |= sizes
            if skip:
                layer["skip"] = skip
    pruned = copy.deepcopy(config)
    pruned.per_layer_config = layers or None
    return pruned


def sizes_by_layer(config: PrunedConfig) -> dict[int | str, dict[str, Any]]:
    """A copy of what `per_layer_config` was set to: of each layer what differs from the dense model."""
    written: dict[str, dict[str, Any]] = config.to_dict().get("per_layer_config") or {}
    return {int(layer): dict(sizes) for layer, sizes in written.items()}


def build_model(
    config: PrunedConfig,
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    cuts: Mapping[str, Cut],
    *,
    trainable: bool = False,
    shared_ends: bool = False,
    dtype: torch.dtype = torch.float32,
    layers_on: torch.device | None = None,
) -> PrunedModel:
    """A model cut physically out of the dense `weights`, on the device of their embeddings.

    Args:
        config: of the model that is cut, dense or pruned already.
        sites: all sites of that model.
        weights: its state dict.
        cuts: by site name; a site without an entry stays as it is.
        trainable: copy every tensor, so that training leaves `weights` alone. Without it, all are in their dtype, and
            those that are not cut are shared.
        shared_ends: of a trainable model too, share embeddings, last norm and head.
        dtype: of the copies.
        layers_on: where the layers are to be; by default where the embeddings are.
    """
    device, given = weights[EMBEDDINGS].device, weights[EMBEDDINGS].dtype

    def place(name: str) -> torch.device:
        return layers_on if layers_on is not None and name.startswith(LAYERS) else device

    tensors = _cut_tensors(sites, weights, cuts)
    own = {
        name: torch.empty_like(tensor, dtype=dtype, device=place(name))
        for name, tensor in tensors.items()
        if trainable and (name.startswith(LAYERS) or not shared_ends)
    }
    if own:
        torch._foreach_copy_(list(own.values()), [tensors[name] for name in own])
    tensors = {name: own[name] if name in own else tensor.to(place(name), given) for name, tensor in tensors.items()}
    return assemble(pruned_config(config, sites, cuts), tensors, trainable=trainable)


def build_layer(
    config: PrunedConfig,
    layer: int,
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    cuts: Mapping[str, Cut],
    device: torch.device,
) -> nn.Module:
    """One layer of what `build_model` gives, on `device`; `sites` are the layer's, what is there already is shared."""
    prefix, embeddings = f"{LAYERS}{layer}.", weights[EMBEDDINGS]
    own = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    return fill_layer(
        pruned_config(config, sites, cuts),
        layer,
        {name: tensor.to(device, embeddings.dtype) for name, tensor in _cut_tensors(sites, own, cuts).items()},
    )


def fill_layer(config: PrunedConfig, layer: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A decoder layer of these tensors, which have the names that they have in the model; not to be trained."""
    module: nn.Module = empty_layer(config, layer)
    prefix = f"{LAYERS}{layer}."
    module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, assign=True)
    return module.requires_grad_(False).eval()


def copy_trained(
    model: PrunedModel, tensors: Mapping[str, Tensor], layers_on: torch.device | None = None
) -> PrunedModel:
    """A model like `model`, its device and dtype too, with other `tensors`; a tied head need not be in them. Its layers
    are on `layers_on`, if that is another device."""

    def place(name: str) -> torch.device:
        return layers_on if layers_on is not None and name.startswith(LAYERS) else model.device

    return assemble(
        copy.deepcopy(cast(PrunedConfig, model.config)),
        {name: tensor.to(place(name), model.dtype) for name, tensor in tensors.items()},
        trainable=False,
    )


def assemble(pruned: PrunedConfig, tensors: dict[str, Tensor], *, trainable: bool) -> PrunedModel:
    """A model of these tensors, which are not copied; a tied head need not be among them."""
    return fill(empty_model(pruned), tensors, trainable=trainable)


def empty_model(config: PrunedConfig) -> PrunedModel:
    """A model on the meta device, with a config of its own."""
    own = copy.deepcopy(config)
    with torch.device("meta"):
        # Buffers that no file holds must be exact, whatever dtype the weights will have.
        model: PrunedModel = causal_lm(own)._from_config(own, dtype=torch.float32)
    own.dtype = config.dtype
    return model


def fill(
    model: PrunedModel, tensors: Mapping[str, Tensor], *, trainable: bool = False, strict: bool = True
) -> PrunedModel:
    """`model`, which is on the meta device, of these tensors, which are not copied; a tied head need not be there.

    Unless `strict`, what else is missing stays on the meta device.
    """
    device = tensors[EMBEDDINGS].device
    for module in model.modules():
        # What a checkpoint does not hold, such as the frequencies of rotary embeddings.
        missing = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in missing:
            buffer = module.get_buffer(name)
            nothing = float("nan") if buffer.is_floating_point() else 0
            module._buffers[name] = torch.full(buffer.shape, nothing, dtype=buffer.dtype, device=device)
        if missing:
            model._init_weights(module)
    tied = bool(model.config.tie_word_embeddings)
    tensors = {**tensors, HEAD: tensors[EMBEDDINGS]} if tied else tensors
    model.load_state_dict(tensors, strict=strict, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.requires_grad_(trainable)
    model.train(trainable)
    return model


def _cut_tensors(sites: Sequence[Site], weights: Mapping[str, Tensor], cuts: Mapping[str, Cut]) -> dict[str, Tensor]:
    cut = [site for site in sites if site.name in cuts]
    changed = {name for site in cut for name in site.tensors}
    tensors = {name: tensor for name, tensor in weights.items() if name not in changed}
    for site in cut:
        tensors |= cut_site(site, weights, cuts[site.name])
    return tensors


def _cut_experts(site: Site, weights: Mapping[str, Tensor], cut: Cut) -> dict[str, Tensor]:
    """What is left of the input projections of experts that each keep some channels."""
    device = weights[site.output_tensor].device
    channels_EK = torch.tensor(cut.kept).expand(site.experts, -1) if cut.channels is None else cut.channels
    channels_EK = channels_EK.to(device, torch.long)
    rows: dict[str, list[Rows]] = {}
    for some in site.inputs:
        rows.setdefault(some.tensor, []).append(some)
    left = {}
    for name, parts in rows.items():
        # In the order that they have in the tensor, be it one part after another or in turns.
        index_EJ = torch.cat([some.start + some.step * channels_EK for some in parts], dim=1).sort(dim=1).values
        others = [1] * (weights[name].dim() - 1)
        others[parts[0].dim - 1] = -1
        left[name] = weights[name].take_along_dim(index_EJ.view(site.experts, *others), dim=parts[0].dim)
    return left


@functools.lru_cache(maxsize=1024)
def _kept_rows(rows: Rows, kept: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the rows of the units `kept` are. Candidates ask for the same again and again, and a list that becomes a
    tensor is a wait for the device."""
    groups = torch.tensor(rows.kept(kept), device=device)
    return rows.start + (groups[:, None] * rows.rows + torch.arange(rows.rows, device=device)).flatten()


def _query_heads_by_kv_head(site: Site, kept: Sequence[int]) -> list[int]:
    if site.kind == "mlp":
        return []
    heads: dict[int, int] = {}
    for unit in kept:
        kv_head = site.kv_heads[unit]
        heads[kv_head] = heads.get(kv_head, 0) + site.heads_per_unit
    return [heads[kv_head] for kv_head in sorted(heads)]


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
