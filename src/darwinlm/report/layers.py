"""Layer sizes as a table: of a run, of a pruned model, or of any model that can be pruned."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

from darwinlm.adapters.config import load_sizes
from darwinlm.adapters.families import LAYERS, dense_again, family_of
from darwinlm.adapters.loading import expected_shapes
from darwinlm.adapters.modeling_darwinlm import PrunedConfig
from darwinlm.demo import resolve
from darwinlm.errors import UserError
from darwinlm.report.facts import collect
from darwinlm.run_directory import is_run

_BAR = 14


def inspect(source: str) -> list[dict[str, Any]]:
    """Return the layer sizes of a run, or of a model from its config only, for `show_layers`.

    Args:
        source: run directory, model folder (also `RUN/model`), or Hub model id.

    Returns:
        One entry, or one per size for a family. `layers` is as in `metrics.json`, with attention in query heads or, for
        a run without a model yet, in the units of its search.

    Raises:
        UserError: if it is none of these, or a run without a plan so far.
    """
    if not is_run(Path(source)):
        return [{"title": source, **model_sizes(load_sizes(resolve(source)))}]
    facts = collect(Path(source))
    found = []
    for name, size in (facts.get("sizes") or {facts["target"]: facts}).items():
        folder = Path(source) / "sizes" / name if "sizes" in facts else Path(source)
        if "layers" not in size:
            raise UserError(f"{source}: the run has no plan for {name} yet; try again after its search has started")
        entry = {"title": f"{facts['model']} at {name}", "limits": size.get("limits", [])}
        if (folder / "model" / "config.json").is_file():
            entry |= model_sizes(load_sizes(str(folder / "model")))
        else:
            entry |= {key: size[key] for key in ("layers", "parameters", "dense_parameters")}
            entry |= {"attention_unit": facts["attention_unit"], "title": f"{entry['title']}, best plan so far"}
        found.append(entry)
    return found


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


def show_layers(entry: Mapping[str, Any], console: Console) -> None:
    """Print one entry of `inspect`: a line with two bars for each layer, and totals."""
    table = Table(title=entry["title"], title_justify="left", box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    for name in (f"attention ({entry['attention_unit']})", f"MLP ({mlp_unit(entry['layers'])})"):
        table.add_column(name, no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("of dense", justify="right", no_wrap=True)
    for layer in entry["layers"]:
        sites = (layer["attention"], layer["mlp"])
        cells: list[Any] = []
        for site in sites:
            bar = ProgressBar(total=site["dense"], completed=site["kept"], width=_BAR, style="dim")
            size = f"{site['kept']:,} of {site['dense']:,}" if site["kept"] else "removed" if site["dense"] else "none"
            if site.get("unit") == "experts" != mlp_unit(entry["layers"]):
                size += " experts"
            cells += [bar, size]
        left, full = (sum(site[key] for site in sites) for key in ("parameters", "dense_parameters"))
        table.add_row(str(layer["layer"]), *cells, f"{left:,}", f"{left / full:.1%}" if full else "")
    console.print(table)
    left = entry["parameters"]
    parts = [layer[kind] for layer in entry["layers"] for kind in ("attention", "mlp")]
    fixed = left - sum(part["parameters"] for part in parts)
    full = fixed + sum(part["dense_parameters"] for part in parts)
    lines = [
        f"total: {left:,} of {full:,} parameters ({left / full:.1%}), {fixed:,} of them outside the layers",
        *(
            f"limit on {limit['name']}: {limit['found']:,} of {limit['dense']:,} {limit['unit']} ({limit['share']:.1%})"
            for limit in entry.get("limits", [])
        ),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
