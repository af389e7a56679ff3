"""Physical removal of units: smaller tensors, and models built from them. Removed units are never replaced by zeros."""

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from darwinlm.models.families import EMBEDDINGS, HEAD, LAYERS, causal_lm, empty_layer
from darwinlm.models.modeling_darwinlm import PrunedConfig, PrunedModel
from darwinlm.models.norms import fuse_norms
from darwinlm.models.sites import Rows, Site
from darwinlm.plan import SiteKind

_SIZES: Mapping[SiteKind, Sequence[str]] = {
    "attention": ("num_attention_heads", "num_key_value_heads", "query_heads_per_kv_head"),
    "mlp": ("intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts"),
}
"""Size settings of a layer in `per_layer_config`."""
_TOGETHER = 8
"""Layers that are cut and copied together: only their cut tensors exist twice."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A site with fewer units: the kept units, and the output projection refitted to them."""

    kept: tuple[int, ...]
    """Kept unit indices in the dense site, ascending; empty if the whole site is removed."""
    output_weight: Tensor | None
    """Refitted output projection, (output rows, kept units * columns_per_unit); for a mixture, the fused tensor of all
    experts; None if the whole site is removed."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Factor of each norm weight (by tensor name) of norms over all heads, whose mean is now over the kept heads."""
    channels: Tensor | None = None
    """If units are channels of experts, the channels that each expert keeps, ascending: (experts, kept units). None if
    channel k is unit k in each expert."""


def cut_site(site: Site, weights: Mapping[str, Tensor], cut: Cut) -> dict[str, Tensor]:
    """Return the remaining tensors of `site`, by name; empty if the whole site is removed."""
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
    for name, parts in rows.items():
        left[name] = weights[name].index_select(0, torch.cat(parts) if len(parts) > 1 else parts[0])
    left |= {name: left[name] * factor for name, factor in cut.factors.items()}
    left[site.output_tensor] = cut.output_weight
    return left


def output_columns(site: Site, weight: Tensor, units: Sequence[int]) -> Tensor:
    """Return the part of the output projection `weight` for `units`, not refitted."""
    kept = torch.tensor(units, device=weight.device)
    if site.routed:
        return weight.index_select(site.output_dim, kept)
    columns = kept[:, None] * site.columns_per_unit + torch.arange(site.columns_per_unit, device=weight.device)
    return weight.index_select(1, columns.flatten())


def mean_factor(rows: Rows, units: Sequence[int], shares: Sequence[float]) -> float:
    """Return the factor of the weight of a norm over all heads after pruning to `units`.

    The norm divides by a root mean square: before pruning over all groups of rows, afterwards over the kept ones.
    `shares` are their shares of the sum of squares, averaged over tokens.
    """
    kept = rows.kept(units)
    return math.sqrt(sum(shares[group] for group in kept) * len(shares) / len(kept))


def count_parameters(site: Site, shapes: Mapping[str, Sequence[int]], kept: Sequence[int]) -> int:
    """Return the number of parameters of `site` with the units `kept`, including its norms."""
    if not kept:
        return 0
    count = sum(_numel(shapes[name]) for name in site.whole)
    for rows in site.inputs:
        shape = shapes[rows.tensor]
        count += len(rows.kept(kept)) * rows.rows * (_numel(shape) // shape[rows.dim])
    return count + _numel(shapes[site.output_tensor]) // site.num_units * len(kept)


def active_parameters(site: Site, shapes: Mapping[str, Sequence[int]], units: int) -> int:
    """Return the active parameters per token of a mixture with `units` units: routed experts, and everything else."""
    module = site.output.rpartition(".")[0]
    if site.experts:
        everything = count_parameters(site, shapes, range(units))
        outside = sum(_numel(shapes[name]) for name in site.whole if not name.startswith(f"{module}."))
        return outside + (everything - outside) // site.experts * site.routed
    reached = min(units, site.routed)
    router = (_numel(shapes[rows.tensor][1:]) for rows in site.inputs if not rows.tensor.startswith(f"{module}."))
    return count_parameters(site, shapes, range(reached)) + (units - reached) * sum(router)


def kv_elements(site: Site, kept: Sequence[int], head_dim: int) -> int:
    """Return the KV-cache elements per token of the site: keys and values of its KV heads."""
    return 2 * head_dim * len(_query_heads_by_kv_head(site, kept))


def layer_sizes(site: Site, kept: Sequence[int]) -> dict[str, Any]:
    """Return the `per_layer_config` entries of `site` with the units `kept`."""
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
    """Return `config` with the sizes of `cuts` (by site name; sites without an entry are unchanged)."""
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
    """Return a copy of the original `per_layer_config`: per layer, the differences from the dense model."""
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
    """Build a model cut physically out of the dense `weights`, on the device of their embeddings.

    Args:
        config: config of the model to cut, dense or already pruned.
        sites: all sites of that model.
        weights: its state dict.
        cuts: cuts by site name; sites without an entry are unchanged.
        trainable: copy every tensor, so that training does not change `weights`. Otherwise tensors keep their dtype,
            and unpruned tensors are shared.
        shared_ends: share embeddings, last norm and head even if trainable.
        dtype: dtype of the copies.
        layers_on: device of the layers; by default that of the embeddings.

    Returns:
        The pruned model, in evaluation mode unless it is trainable.
    """
    device, given = weights[EMBEDDINGS].device, weights[EMBEDDINGS].dtype

    def place(name: str) -> torch.device:
        return layers_on if layers_on is not None and name.startswith(LAYERS) else device

    tensors: dict[str, Tensor] = {}
    by_part: dict[int, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        layer = int(name.removeprefix(LAYERS).split(".")[0]) if name.startswith(LAYERS) else -_TOGETHER
        by_part.setdefault(layer // _TOGETHER, {})[name] = tensor
    for part, some in by_part.items():
        cut = _cut_tensors([site for site in sites if site.layer // _TOGETHER == part], some, cuts)
        own = {
            name: torch.empty_like(tensor, dtype=dtype, device=place(name))
            for name, tensor in cut.items()
            if trainable and (name.startswith(LAYERS) or not shared_ends)
        }
        if own:
            torch._foreach_copy_(list(own.values()), [cut[name] for name in own])
        tensors |= {name: own[name] if name in own else cut[name].to(place(name), given) for name in cut}
    return assemble(pruned_config(config, sites, cuts), tensors, trainable=trainable)


def build_layer(
    config: PrunedConfig,
    layer: int,
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    cuts: Mapping[str, Cut],
    device: torch.device,
) -> nn.Module:
    """Build one layer of `build_model` on `device`; `sites` are those of the layer, and existing tensors are shared."""
    prefix, embeddings = f"{LAYERS}{layer}.", weights[EMBEDDINGS]
    own = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    return fill_layer(
        pruned_config(config, sites, cuts),
        layer,
        {name: tensor.to(device, embeddings.dtype) for name, tensor in _cut_tensors(sites, own, cuts).items()},
    )


def fill_layer(config: PrunedConfig, layer: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build a decoder layer from these tensors, named as in the model; not trainable."""
    module: nn.Module = empty_layer(config, layer)
    prefix = f"{LAYERS}{layer}."
    module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, assign=True)
    if tensors:  # else attention and MLP are removed
        fuse_norms(module, next(iter(tensors.values())).device)
    return module.requires_grad_(False).eval()


def copy_trained(
    model: PrunedModel, tensors: Mapping[str, Tensor], layers_on: torch.device | None = None
) -> PrunedModel:
    """Build a model like `model`, with its device and dtype, from other `tensors`; a tied head may be missing. Its
    layers are on `layers_on`, if given."""

    def place(name: str) -> torch.device:
        return layers_on if layers_on is not None and name.startswith(LAYERS) else model.device

    return assemble(
        copy.deepcopy(cast(PrunedConfig, model.config)),
        {name: tensor.to(place(name), model.dtype) for name, tensor in tensors.items()},
        trainable=False,
    )


def assemble(pruned: PrunedConfig, tensors: dict[str, Tensor], *, trainable: bool) -> PrunedModel:
    """Build a model from these tensors, without copying; a tied head may be missing."""
    return fill(empty_model(pruned), tensors, trainable=trainable)


def empty_model(config: PrunedConfig) -> PrunedModel:
    """Create a model on the meta device, with its own config."""
    own = copy.deepcopy(config)
    with torch.device("meta"):
        # Buffers that are not stored in files must be exact, whatever the dtype of the weights.
        model: PrunedModel = causal_lm(own)._from_config(own, dtype=torch.float32)
    own.dtype = config.dtype
    return model


def fill(
    model: PrunedModel, tensors: Mapping[str, Tensor], *, trainable: bool = False, strict: bool = True
) -> PrunedModel:
    """Fill `model`, which is on the meta device, with these tensors, without copying; a tied head may be missing.

    Unless `strict`, other missing tensors stay on the meta device.
    """
    device = tensors[EMBEDDINGS].device
    for module in model.modules():
        # Buffers that a checkpoint does not store, such as the frequencies of rotary embeddings.
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
    fuse_norms(model, device)
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
    """Return the remaining input projections of experts that each keep some channels."""
    device = weights[site.output_tensor].device
    channels_EK = torch.tensor(cut.kept).expand(site.experts, -1) if cut.channels is None else cut.channels
    channels_EK = channels_EK.to(device, torch.long)
    rows: dict[str, list[Rows]] = {}
    for some in site.inputs:
        rows.setdefault(some.tensor, []).append(some)
    left = {}
    for name, parts in rows.items():
        # Keep the order of the rows in the tensor, whether parts are concatenated or interleaved.
        index_EJ = torch.cat([some.start + some.step * channels_EK for some in parts], dim=1).sort(dim=1).values
        others = [1] * (weights[name].dim() - 1)
        others[parts[0].dim - 1] = -1
        left[name] = weights[name].take_along_dim(index_EJ.view(site.experts, *others), dim=parts[0].dim)
    return left


@functools.lru_cache(maxsize=1024)
def _kept_rows(rows: Rows, kept: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the row indices of the units `kept`. Cached, because candidates need the same indices repeatedly, and
    converting a list to a tensor synchronizes the device."""
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
