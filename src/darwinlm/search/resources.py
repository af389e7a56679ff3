"""What plans take of each resource that a budget can limit: parameters, those that a token meets, FLOPs, KV cache,
memory, measured latency."""

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from darwinlm import dist
from darwinlm.adapters.cutting import Cut, active_parameters, assemble, cut_site, layer_sizes, output_columns
from darwinlm.adapters.families import LAYERS, Site, dense_again, sites_needed, window_of
from darwinlm.adapters.loading import DenseModel, served_dtype
from darwinlm.adapters.modeling_darwinlm import PrunedModel
from darwinlm.files import read_json, write_json
from darwinlm.plan import Limit, SiteKind, SiteLevels, Space, parameter_limit
from darwinlm.progress import task
from darwinlm.recipe import WorkloadRecipe
from darwinlm.timing import time_request

_TIMED_TOKENS = 16
"""New tokens that are timed; each takes about as long as the next."""
_REPEATS = 5
_KINDS: tuple[SiteKind, ...] = ("attention", "mlp")


def resource_limits(
    dense: DenseModel, space: Space, names: Iterable[str], workload: WorkloadRecipe, latency_file: Path
) -> dict[str, Limit]:
    """What plans take of the resources `names`, their maxima not filled in.

    Args:
        dense: the model.
        space: the levels of every site.
        names: of `RESOURCES` in `darwinlm.target`.
        workload: the request that FLOPs, memory and latency are counted for.
        latency_file: holds the measured latencies, or will; needed for `latency` alone.
    """
    made = {
        "params": lambda: parameter_limit(space),
        "active_params": lambda: _active_parameters(dense, space),
        "flops": lambda: _flops(dense, space, workload),
        "kv_cache": lambda: _kv_cache(dense, space),
        "memory": lambda: _memory(dense, space, workload),
        "latency": lambda: _latency(dense, space, workload, latency_file),
    }
    return {name: made[name]() for name in names}


def _active_parameters(dense: DenseModel, space: Space) -> Limit:
    """Embeddings and head included, as the field counts them."""
    costs = tuple(_active(dense, site, levels) for site, levels in zip(dense.sites, space.sites, strict=True))
    fixed = space.fixed_parameters
    return Limit(name="active_params", unit="active parameters", fixed=fixed, costs=costs, maximum=0)


def _active(dense: DenseModel, site: Site, levels: SiteLevels) -> tuple[int, ...]:
    """By level, the parameters that a token meets."""
    if not site.routed:
        return levels.parameters
    return tuple(active_parameters(site, dense.shapes, units) if units else 0 for units in levels.units)


def _flops(dense: DenseModel, space: Space, workload: WorkloadRecipe) -> Limit:
    """Of one request: two a parameter and token, and the attention over what came before."""
    tokens = workload.prompt_tokens + workload.new_tokens
    config = dense.config

    def attended(layer: int) -> int:
        window = window_of(config, layer)
        return sum(min(position + 1, window or tokens) for position in range(tokens))

    by_layer = [attended(layer) for layer in range(config.num_hidden_layers)]
    costs = []
    for site, levels in zip(dense.sites, space.sites, strict=True):
        # Queries by keys, and weights by values: 2 * 2 * head_dim for each pair of positions.
        per_unit = 4 * config.head_dim * site.heads_per_unit * by_layer[site.layer]
        costs.append(
            tuple(
                workload.batch_size * (2 * parameters * tokens + per_unit * units)
                for parameters, units in zip(_active(dense, site, levels), levels.units, strict=True)
            )
        )
    # Logits are needed for every new token alone.
    head = 2 * config.vocab_size * config.hidden_size * max(1, workload.new_tokens) * workload.batch_size
    return Limit(name="flops", unit="FLOPs", fixed=head, costs=tuple(costs), maximum=0)


def _kv_cache(dense: DenseModel, space: Space) -> Limit:
    costs = tuple(tuple(count * dense.dtype.itemsize for count in site.kv_elements) for site in space.sites)
    return Limit(name="kv_cache", unit="bytes a token", fixed=0, costs=costs, maximum=0)


def _memory(dense: DenseModel, space: Space, workload: WorkloadRecipe) -> Limit:
    """Weights, and the KV cache of a whole request."""
    size, tokens = dense.dtype.itemsize, workload.batch_size * (workload.prompt_tokens + workload.new_tokens)
    costs = tuple(
        tuple(size * (one + kv * tokens) for one, kv in zip(site.parameters, site.kv_elements, strict=True))
        for site in space.sites
    )
    return Limit(name="memory", unit="bytes", fixed=size * space.fixed_parameters, costs=costs, maximum=0)


def _latency(dense: DenseModel, space: Space, workload: WorkloadRecipe, file: Path) -> Limit:
    if dist.rank() == 0 and not file.exists():
        write_json(file, measure_latencies(dense, space, workload), sealed=True)
    # The same numbers on every rank, whoever measured them. Other timings would make another budget.
    remedy = f"delete {file.parent} and run the same command again: latencies are measured and the search runs anew"
    table = dist.gather(read_json(file, remedy) if dist.rank() == 0 else {})[0]
    costs = tuple(tuple(table[site.kind].get(str(units), 0) for units in site.units) for site in space.sites)
    return Limit(name="latency", unit="ns", fixed=table["fixed"], costs=costs, maximum=0)


def measure_latencies(dense: DenseModel, space: Space, workload: WorkloadRecipe) -> dict[str, Any]:
    """Nanoseconds of one request by kind of site and units kept, and what is left without any site.

    A stack of all layers with one kind of site at one size (the other kind removed) is timed, prompt and new tokens,
    against the stack with neither; a single layer would stay in the cache and look faster than it is. All stacks are
    timed in turns and the median counts, so that a slow moment of the machine hurts no size alone.

    Returns:
        `{"fixed": ns, "attention": {"3": ns, ...}, "mlp": {"1536": ns, ...}}`
    """
    dtype = served_dtype(dense.dtype, dense.device)
    weights = {name: tensor.to(dtype) for name, tensor in dense.weights.items()}
    sizes = {
        kind: sorted({n for site in space.sites if site.kind == kind for n in site.units} - {0}) for kind in _KINDS
    }
    stacks: dict[tuple[str, int], PrunedModel] = {("none", 0): _stack(dense, weights)}
    for kind in _KINDS:
        # In a model that is pruned already, it alone may have all sizes.
        largest = max(
            (site for site in dense.sites if site.kind == kind), key=lambda site: site.num_units, default=None
        )
        stacks |= {(kind, size): _stack(dense, weights, largest, size) for size in sizes[kind]}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in stacks}
    timed = min(_TIMED_TOKENS, workload.new_tokens)
    with task("latencies (timings)", len(stacks) * (_REPEATS + 1)) as progress:
        for repeat in range(_REPEATS + 1):
            for key, model in stacks.items():
                prompt, new = time_request(
                    model, batch_size=workload.batch_size, prompt_tokens=workload.prompt_tokens, new_tokens=timed
                )
                if repeat > 0:
                    times[key].append(prompt + (new / timed * workload.new_tokens if timed else 0.0))
                progress.advance()
    seconds = {key: statistics.median(values) for key, values in times.items()}
    fixed = seconds["none", 0]
    table: dict[str, Any] = {"fixed": round(1e9 * fixed)}
    for kind in _KINDS:
        layers = max(1, len(_layers_with(dense, kind)))
        table[kind] = {str(size): max(0, round(1e9 * (seconds[kind, size] - fixed) / layers)) for size in sizes[kind]}
    return table


def _layers_with(dense: DenseModel, kind: SiteKind) -> list[int]:
    """The layers that had such a site before anything was pruned; in hybrid models not all have attention."""
    return sorted({site.layer for site in dense.sites_before or dense.sites if site.kind == kind})


def _stack(dense: DenseModel, weights: Mapping[str, Tensor], site: Site | None = None, units: int = 0) -> PrunedModel:
    """All layers with a copy of the first `units` units of `site` and nothing else; without it, without any part."""
    config = dense_again(dense.config)
    kept = tuple(range(units))
    # Without it hybrid models cannot use their caches: it is in every stack.
    needed = sites_needed(dense.config, dense.sites)
    layers: dict[int | str, dict[str, Any]] = {}
    for layer in range(config.num_hidden_layers):
        there = [kind for kind in _KINDS if layer in _layers_with(dense, kind)]
        own = site is not None and site.kind in there
        layers[layer] = layer_sizes(site, kept) if site is not None and own else {}
        layers[layer]["skip"] = [
            kind for kind in there if (site is None or kind != site.kind) and f"layers.{layer}.{kind}" not in needed
        ]
    config.per_layer_config = layers
    in_sites = {name for one in (*dense.sites, *dense.sites_before) if one.name not in needed for name in one.tensors}
    tensors = {name: tensor for name, tensor in weights.items() if name not in in_sites}
    if site is not None:
        output = output_columns(site, weights[site.output_tensor], kept)
        left, old = cut_site(site, weights, Cut(kept, output)), f"{LAYERS}{site.layer}."
        for layer in _layers_with(dense, site.kind):
            # Each layer with memory of its own, as in the model.
            new = f"{LAYERS}{layer}."
            tensors |= {name.replace(old, new, 1): tensor.clone() for name, tensor in left.items()}
    return assemble(config, tensors, trainable=False)
