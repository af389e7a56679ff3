"""Layer sizes of a model, from its config only."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from darwinlm.models.families import LAYERS, dense_again, family_of
from darwinlm.models.loading import expected_shapes
from darwinlm.models.modeling_darwinlm import PrunedConfig


def model_sizes(config: PrunedConfig) -> dict[str, Any]:
    """Return `layers`, `parameters` and `dense_parameters` of a model, from the shapes of its weights."""
    shapes, dense = expected_shapes(config), expected_shapes(dense_again(config))
    layers = []
    for number in range(config.num_hidden_layers):
        layer: dict[str, Any] = {"layer": number}
        for kind, names in config.layer_parts.items():
            prefixes = tuple(f"{LAYERS}{number}.{name}." for name in names)
            family = family_of(config)
            output = f"{LAYERS}{number}.{family.output(kind)}.weight"
            columns = config.head_dim if kind == "attention" else 1
            kept, full = (some.get(output, (0, 0))[1] // columns for some in (shapes, dense))
            experts = f"{LAYERS}{number}.{family.mlp}.{family.experts}.down_proj"
            unit = "channels"
            if kind == "mlp" and experts in dense:
                # Units that were removed: experts, or channels of each expert.
                sizes = [_experts_of(config, some.get(experts, (0, 0, 0))) for some in (shapes, dense)]
                unit = "experts" if sizes[0][0] < sizes[1][0] or sizes[0][1] == sizes[1][1] else "channels"
                kept, full = (size[unit == "channels"] for size in sizes)
            layer[kind] = {
                "kept": kept,
                "dense": full,
                "share": kept / full if full else 0.0,
                "parameters": _count(shapes, prefixes),
                "dense_parameters": _count(dense, prefixes),
            }
            if kind == "mlp":
                layer[kind]["unit"] = unit
        layers.append(layer)
    return {
        "layers": layers,
        "attention_unit": "query heads",
        "parameters": _count(shapes, ""),
        "dense_parameters": _count(dense, ""),
    }


def _experts_of(config: PrunedConfig, down: Sequence[int]) -> tuple[int, int]:
    """Return the number of experts of a layer, and their channels, from the shape of their output projections."""
    return down[0], down[1 if family_of(config).experts_transposed else 2]


def mlp_unit(layers: Sequence[Mapping[str, Any]]) -> str:
    """Return the unit of the MLPs of all these layers: channels, experts, or both."""
    # Runs of earlier versions had no experts.
    return ", ".join(sorted({layer["mlp"].get("unit", "channels") for layer in layers}))


def _count(shapes: Mapping[str, Sequence[int]], prefixes: str | tuple[str, ...]) -> int:
    return sum(prod(shape) for name, shape in shapes.items() if name.startswith(prefixes))
