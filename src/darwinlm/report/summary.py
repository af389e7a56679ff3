"""The table at the end of a run."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
    """Print the rows of `metrics.json` as a table and what the models say."""
    table = Table(title=f"{metrics['model']} at {metrics['target']}: held-out text, {metrics['environment']['device']}")
    for key, title in _TITLES.items():
        table.add_column(title, justify="left" if key == "name" else "right", no_wrap=True)
    for row in metrics["rows"]:
        table.add_row(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['perplexity']:.2f}",
            f"{row['kl']:.4f}",
            f"{row['kv_cache_bytes_per_token']:,}",
            f"{row['prefill_tokens_per_second']:.0f}",
            f"{row['decode_tokens_per_second']:.1f}",
        )
    console.print(table)
    for limit in metrics.get("limits", []):
        line = f"{limit['name']}: {limit['found'] / limit['dense']:.4f} of the dense model's"
        if "measured" in limit:
            line += f" predicted, {limit['measured']['found'] / limit['measured']['dense']:.4f} measured"
        console.print(line, highlight=False)
    sample = metrics["sample"]
    console.print(f"[bold]{escape(sample['prompt'])}[/bold] …")
    for name in ("before", "after"):
        console.print(f"  {name}: {escape(' '.join(sample[name].split()))}", highlight=False)


def show_tasks(results: Mapping[str, Any], console: Console) -> None:
    """Print what `tasks.json` holds: accuracies with standard errors, differences and p-values."""
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


def _accuracies(models: Mapping[str, Any]) -> list[str]:
    cells = []
    for one in models.values():
        cells.append(f"{100 * one['accuracy']:.1f} ± {100 * one['stderr']:.1f}")
        if "difference" in one:
            cells.append(f"{100 * one['difference']:+.1f} ± {100 * one['difference_stderr']:.1f}")
            cells.append(f"{one['p']:.2g}")
    return cells
