"""Summary tables: results of a run, predicted costs, zero-shot tasks and speeds."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from darwinlm.estimate.rates import Machine
from darwinlm.estimate.work import Costs
from darwinlm.report.numbers import plain
from darwinlm.runtime.progress import printable

_TITLES = {
    "name": "model",
    "parameters": "parameters",
    "perplexity": "perplexity",
    "kl": "KL to dense",
    "kv_cache_bytes_per_token": "KV bytes/token",
    "prefill_tokens_per_second": "prefill tok/s",
    "decode_tokens_per_second": "decode tok/s",
}


def show(metrics: Mapping[str, Any], console: Console) -> None:
    """Print the rows of `metrics.json` as a table, and the sample outputs."""
    environment = metrics["environment"]
    title = f"{metrics['model']} at {metrics['target']}: test split; speeds on {environment['device']}"
    if "speed_dtype" in environment:
        title += f" in {environment['speed_dtype']}"
    table = Table(title=_shown(title))
    for key, title in _TITLES.items():
        table.add_column(title, justify="left" if key == "name" else "right", no_wrap=True)
    for row in metrics["rows"]:
        table.add_row(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['perplexity']:.2f}",
            f"{row['kl']:.4f}",
            f"{row['kv_cache_bytes_per_token']:,}",
            plain(row["prefill_tokens_per_second"]),
            plain(row["decode_tokens_per_second"]),
        )
    console.print(table)
    for limit in metrics.get("limits", []):
        line = f"{limit['name']}: {limit['found'] / limit['dense']:.4f} of the dense model"
        if "measured" in limit:
            line += f" predicted, {limit['measured']['found'] / limit['measured']['dense']:.4f} measured"
        console.print(line, highlight=False)
    sample = metrics["sample"]
    console.print(f"[bold]{_shown(sample['prompt'])}[/bold] …")
    for name in ("before", "after"):
        console.print(f"  {name}: {_shown(sample[name])}", highlight=False)


def show_costs(costs: Costs, machine: Machine, console: Console) -> None:
    """Print predicted time and memory by stage, and what to change if there is not enough memory."""
    each = " each" if machine.devices > 1 else ""
    table = Table(title=f"on {machine.name}, {machine.memory / 1e9:.0f} GB{each}: predicted, not measured")
    table.add_column("stage")
    for title in ("time", "peak memory", "fits"):
        table.add_column(title, justify="right")
    for stage in costs.stages:
        fits = "yes" if stage.memory < machine.memory else "no"
        table.add_row(stage.name, _duration(stage.seconds), f"{stage.memory / 1e9:.1f} GB", fits)
    table.add_row("all", _duration(sum(stage.seconds for stage in costs.stages)), "", "")
    console.print(
        f"{costs.dense_parameters:,} parameters, target {costs.target_parameters:,}; "
        f"{costs.smallest_parameters:,} (embeddings, head, final norm) cannot be removed",
        highlight=False,
    )
    console.print(table)
    if costs.host_memory:
        console.print(
            f"CPU memory: {costs.host_memory / 1e9:.0f} GB for what the device cannot hold (search.offload, "
            "recovery.sharding=fsdp_offload)",
            highlight=False,
        )
    console.print(f"disk: {costs.disk / 1e9:.1f} GB", highlight=False)
    for setting in costs.advice:
        console.print(f"to make it fit: {setting}", highlight=False)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show_tasks(results: Mapping[str, Any], console: Console) -> None:
    """Print the content of `tasks.json`: accuracies with standard errors, differences and p-values."""
    names = list(results["tasks"][0]["models"])
    table = Table(title="zero-shot tasks: accuracy in % ± standard error", title_justify="left")
    for title in ("task", "metric"):
        table.add_column(title, no_wrap=True)
    table.add_column("items", justify="right")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
        if "difference" in results["tasks"][0]["models"][name]:
            table.add_column("difference", justify="right", no_wrap=True)
            table.add_column("p", justify="right", no_wrap=True)
    for one in results["tasks"]:
        table.add_row(one["task"], one["metric"], f"{one['items']:,}", *_accuracies(one["models"]))
    for metric, mean in results["mean"].items():
        table.add_row(f"mean of {mean['tasks']}", metric, "", *_accuracies(mean["models"]), style="bold")
    console.print(table)


def show_speeds(results: Mapping[str, Any], console: Console) -> None:
    """Print the content of `speed.json`: tokens per second by engine, and the ratio to the first model."""
    for engine in results["engines"]:
        if "skipped" in engine:
            console.print(_shown(f"{engine['engine']}: skipped: {engine['skipped']}"), highlight=False)
            continue
        names = list(engine["rows"][0]["models"])
        title = f"tokens per second: {engine['engine']}, {engine['dtype']}, {engine['device']}"
        table = Table(title=_shown(title), title_justify="left")
        for heading in ("batch", "prompt"):
            table.add_column(heading, justify="right")
        for kind in ("prefill", "decode"):
            for name in names:
                table.add_column(f"{kind}, {name}", justify="right", no_wrap=True)
        for row in engine["rows"]:
            cells = []
            for kind in ("prefill", "decode"):
                speeds = [row["models"][name][f"{kind}_tokens_per_second"] for name in names]
                cells += [f"{speeds[0]:.1f}", *(f"{speed:.1f} ({speed / speeds[0]:.2f}x)" for speed in speeds[1:])]
            table.add_row(str(row["batch_size"]), str(row["prompt_tokens"]), *cells)
        console.print(table)


def _accuracies(models: Mapping[str, Any]) -> list[str]:
    cells = []
    for one in models.values():
        cells.append(f"{100 * one['accuracy']:.1f} ± {100 * one['stderr']:.1f}")
        if "difference" in one:
            cells.append(f"{100 * one['difference']:+.1f} ± {100 * one['difference_stderr']:.1f}")
            cells.append(f"{one['p']:.2g}")
    return cells


def _shown(text: str) -> str:
    """Escape markup and control characters."""
    return escape(printable(text))
