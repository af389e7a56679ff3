"""Model card: what was pruned, how, and the measurements."""

import html
import re
from collections.abc import Mapping
from typing import Any

from darwinlm.config.recipe import Recipe
from darwinlm.runtime.progress import printable

_SIZES = "Layer sizes are in `pruned.per_layer_config` of `config.json`. "
_FLAG = ", trust_remote_code=True"
_CODE = (
    "The flag runs `modeling_darwinlm.py`, the only code file here; with the `darwinlm` package installed, "
    '`darwinlm.load("this-folder")` needs no flag.'
)


def model_card(recipe: Recipe, plan: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Return Markdown for `README.md`, with a table of `metrics["rows"]` and the complete recipe."""
    base = recipe.model.rstrip("/").split("/")[-1] if recipe.model.count("/") != 1 else recipe.model
    share = plan["parameters"] / plan["dense_parameters"]
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [darwinlm, pruned]", "---"]
    lines = [
        *front,
        "",
        f"# {_plain(base)}, pruned to {share:.1%} of its parameters",
        "",
        f"{plan['parameters']:,} of {plan['dense_parameters']:,} parameters are kept; the plan is in "
        f"`plan.json`. {_SIZES}Made with DarwinLM.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("this-folder"{_FLAG})',
        'tokenizer = AutoTokenizer.from_pretrained("this-folder")',
        "```",
        "",
        _CODE,
        "",
        "## Measured",
        "",
        "| model | parameters | perplexity | KL to dense (nats) | KV cache (bytes per token) | prefill "
        "(tokens/s) | decode (tokens/s) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in metrics["rows"]:
        lines.append(
            f"| {row['name']} | {row['parameters']:,} | {row['perplexity']:.2f} | {row['kl']:.4f} | "
            f"{row['kv_cache_bytes_per_token']:,} | {_speed(row['prefill_tokens_per_second'])} | "
            f"{_speed(row['decode_tokens_per_second'])} |"
        )
    split = f"the test split ({recipe.data.test_tokens:,} tokens in blocks of {recipe.data.sequence_length})"
    text = recipe.model_copy(update={"model": base, "data": _shareable(recipe)}).to_yaml().rstrip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    lines += [
        "",
        f"Perplexity and KL on {split} of {_plain(_name(recipe.data.source))}; speeds on "
        f"{_plain(metrics['environment']['device'])}{_dtype(metrics['environment'])}{_request(metrics)}.",
        "",
        "## Recipe",
        "",
        f"{fence}yaml",
        text,
        fence,
        "",
    ]
    return "\n".join(lines)


def without_code(card: str) -> str:
    """Return the card for a folder without our code."""
    for text in (_SIZES, _FLAG, f"{_CODE}\n\n"):
        card = card.replace(text, "")
    return card


def _plain(text: str) -> str:
    """Escape text for Markdown and HTML, on one line: names come from the authors of a model or dataset."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~:])", r"\\\1", html.escape(printable(text)))


def _speed(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f}"


def _dtype(environment: Mapping[str, Any]) -> str:
    """Return the dtype of the speeds; runs of earlier versions do not record it."""
    return f" in {environment['speed_dtype']}" if "speed_dtype" in environment else ""


def _request(metrics: Mapping[str, Any]) -> str:
    """Return the request whose speed was measured; runs of earlier versions do not record it."""
    request = metrics.get("request")
    if request is None:
        return ""
    return (
        f", batch {request['batch_size']}, {request['prompt_tokens']} prompt and {request['new_tokens']} new tokens, "
        f"median of {request['repeats']}"
    )


def _name(source: str) -> str:
    """Return a Hub id unchanged, and only the last part of a local path, for privacy."""
    if source.count("/") <= 1 and not source.startswith((".", "/", "~")):
        return source
    return source.rstrip("/").split("/")[-1]


def _shareable(recipe: Recipe) -> Any:
    return recipe.data.model_copy(update={"source": _name(recipe.data.source)})
