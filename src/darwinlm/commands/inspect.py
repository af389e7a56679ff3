"""`darwinlm inspect`: layer sizes as a table, of a run, of a pruned model, or of any model that can be pruned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

from darwinlm.errors import UserError
from darwinlm.models.config import load_sizes
from darwinlm.models.smollm2 import resolve
from darwinlm.report.facts import collect
from darwinlm.report.layers import mlp_unit, model_sizes
from darwinlm.run.directory import is_run

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
