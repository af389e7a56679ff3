"""Zero-shot tasks in JSONL files, as task configs of lm-eval. Three formats of items are supported:

- `query`, `choices`, `gold`: the likeliest choice after the query;
- `context_options`, `continuation`, `gold`: the context after which the continuation is likeliest;
- `context`, `continuation`: whether the continuation is the greedy output after the context.

`gold` is the index of the correct one. All items of a file have the same format.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from darwinlm.errors import UserError

_SHAPES: tuple[tuple[str, ...], ...] = (
    ("query", "choices", "gold"),
    ("context_options", "continuation", "gold"),
    ("context", "continuation"),
)
_TEXTS = ("query", "context", "continuation")
_LISTS = ("choices", "context_options")


def local_tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the task config of every `*.jsonl` file in `folder`, by file name without its suffix.

    Raises:
        UserError: if there is no such file, or one is not valid; the message names file and line.
    """
    if not folder.is_dir():
        raise UserError(f"--tasks-dir {folder} is not a folder")
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"--tasks-dir {folder} contains no *.jsonl file")
    return {file.stem: _config(file, _read(file)) for file in files}


def _config(file: Path, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "task": file.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.absolute())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "target_delimiter": " ",
        "metric_list": _metrics("acc"),
        "metadata": {"version": 1.0},
    }
    shape = _shape(items[0])
    if shape == ("context", "continuation"):
        # lm-eval adds no delimiter between the two here.
        fields = {"doc_to_text": "context", "doc_to_target": "{{' ' + continuation}}"}
        return config | fields | {"output_type": "loglikelihood"}
    if "context_options" in shape:
        # lm-eval scores one continuation after several contexts if the text is a number.
        fields = {"doc_to_text": "gold", "doc_to_choice": "context_options", "doc_to_target": "continuation"}
        return config | fields
    fields = {"doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold"}
    if all(item["query"].startswith("Question:") for item in items):
        # As in lm-eval's ARC and PIQA.
        fields["doc_to_text"] = "{{query | trim}}\nAnswer:"
    return config | fields | {"metric_list": _metrics("acc", "acc_norm")}


def _metrics(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def _read(file: Path) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            item = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        _check(item, where)
        if items and _shape(item) != _shape(items[0]):
            raise UserError(f"{where}: its keys differ from those of the first item; put it into a separate file")
        items.append(item)
    if not items:
        raise UserError(f"{file} contains no items")
    return items


def _shape(item: Mapping[str, Any]) -> tuple[str, ...]:
    return next((shape for shape in _SHAPES if set(shape) <= set(item)), ())


def _check(item: Any, where: str) -> None:
    if not isinstance(item, dict) or not _shape(item):
        expected = "; or ".join(", ".join(shape) for shape in _SHAPES)
        raise UserError(f"{where}: an item needs the keys {expected}")
    for key in _shape(item):
        value = item[key]
        if key in _TEXTS and not (isinstance(value, str) and value.strip()):
            raise UserError(f"{where}: {key} must be text")
        if key in _LISTS:
            if not (
                isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) and v.strip() for v in value)
            ):
                raise UserError(f"{where}: {key} must be a list of two or more texts")
            gold = item["gold"]
            if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(value):
                raise UserError(f"{where}: gold must be the index of one of the {len(value)} {key}, from 0")
