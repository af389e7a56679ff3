"""Cost of plans in each resource that a budget can limit: parameters, active parameters, FLOPs, KV cache, memory and
measured latency."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from darwinlm.config.recipe import Recipe, WorkloadRecipe
from darwinlm.database.prunable import Prunable
from darwinlm.metrics.latency import time_request
from darwinlm.models.cutting import Cut, active_parameters, assemble, cut_site, layer_sizes, output_columns
from darwinlm.models.families import LAYERS, dense_again, window_of
from darwinlm.models.loading import DenseModel, served_dtype
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.models.sites import Site, sites_needed
from darwinlm.plan import Budget, Limit, SiteLevels, Space, make_budget, parameter_limit
from darwinlm.run.directory import Size, Step
from darwinlm.runtime import dist
from darwinlm.runtime.files import read_json, write_json
from darwinlm.runtime.progress import task

_TIMED_TOKENS = 16
"""Number of new tokens that are timed; each takes about the same time."""
_REPEATS = 5


def budgets_of(recipe: Recipe, original: Prunable, source: Prunable, step: Step, size: Size) -> tuple[Budget, Budget]:
    """Return the budget of plans for `source` in this step, and the budget of `size` for plans of `original`.

    Fractions refer to the original model.
    """

    def limits(model: Prunable) -> dict[str, Limit]:
        latencies = step.folder / "search" / "latency.json"
        return resource_limits(model.dense, model.space, size.target.limits, recipe.workload, latencies)

    whole = limits(original)
    own = whole
    if source is not original:
        own = {name: replace(limit, reference=whole[name].dense) for name, limit in limits(source).items()}
    return make_budget(size.target.limits, own, step.number / recipe.steps), make_budget(size.target.limits, whole)


def resource_limits(
    dense: DenseModel, space: Space, names: Iterable[str], workload: WorkloadRecipe, latency_file: Path
) -> dict[str, Limit]:
    """Return the costs of plans in the resources `names`, with the maxima not yet set.

    Args:
        dense: dense model.
        space: levels of every site.
        names: names from `RESOURCES` in `darwinlm.config.target`.
        workload: request for which FLOPs, memory and latency are computed.
        latency_file: file of measured latencies, written if missing; only used for `latency`.
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
    """Count active parameters, including embeddings and head, as is customary."""
    costs = tuple(_active(dense, site, levels) for site, levels in zip(dense.sites, space.sites, strict=True))
    fixed = space.fixed_parameters
    return Limit(name="active_params", unit="active parameters", fixed=fixed, costs=costs, maximum=0)


def _active(dense: DenseModel, site: Site, levels: SiteLevels) -> tuple[int, ...]:
    """Return the parameters used per token, by level."""
    if not site.routed:
        return levels.parameters
    return tuple(active_parameters(site, dense.shapes, units) if units else 0 for units in levels.units)


def _flops(dense: DenseModel, space: Space, workload: WorkloadRecipe) -> Limit:
    """Count the FLOPs of one request: two per parameter and token, plus attention over the previous positions."""
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
    # Logits are only needed for new tokens.
    head = 2 * config.vocab_size * config.hidden_size * max(1, workload.new_tokens) * workload.batch_size
    return Limit(name="flops", unit="FLOPs", fixed=head, costs=tuple(costs), maximum=0)


def _kv_cache(dense: DenseModel, space: Space) -> Limit:
    costs = tuple(tuple(count * dense.dtype.itemsize for count in site.kv_elements) for site in space.sites)
    return Limit(name="kv_cache", unit="bytes a token", fixed=0, costs=costs, maximum=0)


def _memory(dense: DenseModel, space: Space, workload: WorkloadRecipe) -> Limit:
    """Count the bytes of the weights and of the KV cache of a whole request."""
    size, tokens = dense.dtype.itemsize, workload.batch_size * (workload.prompt_tokens + workload.new_tokens)
    costs = tuple(
        tuple(size * (one + kv * tokens) for one, kv in zip(site.parameters, site.kv_elements, strict=True))
        for site in space.sites
    )
    return Limit(name="memory", unit="bytes", fixed=size * space.fixed_parameters, costs=costs, maximum=0)


def _latency(dense: DenseModel, space: Space, workload: WorkloadRecipe, file: Path) -> Limit:
    if dist.rank() == 0 and not file.exists():
        write_json(file, measure_latencies(dense, space, workload), sealed=True)
    # All ranks use the same measurements; different timings would give a different budget.
    remedy = f"delete {file.parent} and run the same command again: this measures latencies and restarts the search"
    table = dist.gather(read_json(file, remedy) if dist.rank() == 0 else {})[0]
    costs = tuple(
        tuple(table[_form(site)].get(str(units), 0) for units in levels.units)
        for site, levels in zip(dense.sites, space.sites, strict=True)
    )
    return Limit(name="latency", unit="ns", fixed=table["fixed"], costs=costs, maximum=0)


def measure_latencies(dense: DenseModel, space: Space, workload: WorkloadRecipe) -> dict[str, Any]:
    """Measure the latency of one request in nanoseconds, by form of site and units kept, and without any site.

    Forms are attention, MLPs and mixtures of experts. For each form and size, a stack of all layers with only these
    sites is timed (prompt and new tokens) against a stack without any; a single layer would stay in the cache and
    appear faster. A site that no plan removes is at its smallest size in all other stacks. Stacks are timed in
    alternation and the median is used, so that a temporary slowdown of the machine does not affect a single size.
    """
    dtype = served_dtype(dense.dtype, dense.device)
    weights = {name: tensor.to(dtype) for name, tensor in dense.weights.items()}
    sizes: dict[str, list[int]] = {"attention": [], "mlp": []}
    for site, levels in zip(dense.sites, space.sites, strict=True):
        sizes[_form(site)] = sorted({*sizes.get(_form(site), ()), *levels.units} - {0})
    smallest = {form: some[0] for form, some in sizes.items() if some}
    stacks = {("none", 0): _stack(dense, weights, smallest)}
    stacks |= {
        (form, size): _stack(dense, weights, smallest | {form: size}, form)
        for form, some in sizes.items()
        for size in some
    }
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
    for form, some in sizes.items():
        layers = max(1, len(_layers_with(dense, form)))
        table[form] = {str(size): max(0, round(1e9 * (seconds[form, size] - fixed) / layers)) for size in some}
    return table


def _form(site: Site) -> str:
    return "experts" if site.routed else site.kind


def _layers_with(dense: DenseModel, form: str) -> list[int]:
    """Return the layers that had such a site in the original model; in hybrid models not all layers have attention."""
    return sorted({site.layer for site in dense.sites_before or dense.sites if _form(site) == form})


def _stack(
    dense: DenseModel, weights: Mapping[str, Tensor], sizes: Mapping[str, int], timed: str | None = None
) -> PrunedModel:
    """Build all layers with `sizes[timed]` units in sites of the form `timed`, and other sites only where none can be
    removed.

    All sites of a form are copies of the first units of the largest site.
    """
    config = dense_again(dense.config)
    needed = sites_needed(dense.config, dense.sites)
    layers: dict[int | str, dict[str, Any]] = {layer: {"skip": []} for layer in range(config.num_hidden_layers)}
    in_sites = {name for site in (*dense.sites, *dense.sites_before) for name in site.tensors}
    tensors = {name: tensor for name, tensor in weights.items() if name not in in_sites}
    for form, units in sizes.items():
        # In an already pruned model, only the largest site may support all sizes.
        site = max((one for one in dense.sites if _form(one) == form), key=lambda one: one.num_units)
        kept = tuple(range(units))
        output = output_columns(site, weights[site.output_tensor], kept)
        left, old = cut_site(site, weights, Cut(kept, output)), f"{LAYERS}{site.layer}."
        for layer in _layers_with(dense, form):
            if form != timed and f"layers.{layer}.{site.kind}" not in needed:
                layers[layer]["skip"].append(site.kind)
                continue
            layers[layer] |= layer_sizes(site, kept)
            # Each layer gets its own memory, as in the model.
            new = f"{LAYERS}{layer}."
            tensors |= {name.replace(old, new, 1): tensor.clone() for name, tensor in left.items()}
    config.per_layer_config = layers
    return assemble(config, tensors, trainable=False)
