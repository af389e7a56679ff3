"""The table at the end of a run."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from darwinlm.progress import printable

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
    title = f"{metrics['model']} at {metrics['target']}: held-out text, {metrics['environment']['device']}"
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
    console.print(f"[bold]{_shown(sample['prompt'])}[/bold] …")
    for name in ("before", "after"):
        console.print(f"  {name}: {_shown(sample[name])}", highlight=False)


def _shown(text: str) -> str:
    """Text as it is: neither markup nor commands to the terminal."""
    return escape(printable(text))
