"""`darwinlm evaluate`: a run's models, or one model, on zero-shot tasks."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from darwinlm.adapters.loading import choose_device, load_dense, load_settings
from darwinlm.adapters.modeling_darwinlm import DarwinLMConfig, DarwinLMForCausalLM
from darwinlm.demo import resolve
from darwinlm.errors import UserError
from darwinlm.evaluation.local_tasks import local_tasks
from darwinlm.evaluation.zero_shot import check_data, choose_tasks, compare, require_lm_eval, run_tasks, with_means
from darwinlm.export.hf import load
from darwinlm.files import read_json, run_sizes, write_json
from darwinlm.progress import task
from darwinlm.recipe import Recipe
from darwinlm.report.facts import read_manifest
from darwinlm.report.page import write_report

_Loader = Callable[[], tuple[DarwinLMForCausalLM, Any]]
"""Gives a model and its tokenizer."""


def evaluate(
    source: str, tasks: Sequence[str] = (), *, tasks_dir: str | Path | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Run zero-shot tasks with the dense and the pruned model of a run, or with one model.

    Args:
        source: a finished run, a model's folder, or a Hub id.
        tasks: names of lm-eval's, or `paper`; with `tasks_dir`, of its files (all of them by default).
        tasks_dir: a folder of JSONL files (`evaluation.local_tasks`).
        limit: the first so many items of each task.

    Returns:
        What `report/tasks.json` holds of these tasks; of a run it is written there too, beside the tasks that were run
        before, and the report is written anew.

    Raises:
        UserError: if lm-eval is missing, a task or its data cannot be had, or `source` holds no model.
    """
    local = local_tasks(Path(tasks_dir)) if tasks_dir is not None else {}
    if not tasks and not local:
        raise UserError("name the tasks, --tasks piqa,arc_easy or --tasks paper, or a folder of them, --tasks-dir DIR")
    run = Path(source) if (Path(source) / "manifest.json").is_file() else None
    loaders = _of_run(run) if run is not None else {"model": partial(_one, source)}
    chosen = choose_tasks(tasks, local)
    require_lm_eval()
    check_data(chosen)
    answers = {}
    with task("evaluation (tasks)", len(loaders) * len(chosen)) as progress:
        for name, loader in loaders.items():
            # One model at a time is in memory.
            answers[name] = run_tasks(*loader(), chosen, limit, lambda done: progress.advance(note=done))
    results = compare(answers, chosen, limit)
    if run is not None:
        write_json(run / "report" / "tasks.json", _beside(run / "report" / "tasks.json", results))
        write_report(run)
    return results


def _beside(file: Path, results: dict[str, Any]) -> dict[str, Any]:
    """`results` and what `file` holds of other tasks."""
    if not file.exists():
        return results
    new = {(one["task"], one["metric"]) for one in results["tasks"]}
    older = [one for one in read_json(file)["tasks"] if (one["task"], one["metric"]) not in new]
    return with_means([*older, *results["tasks"]])


def _of_run(run: Path) -> dict[str, _Loader]:
    """The dense model and that of every size, by name. Raises UserError if one is not there yet."""
    recipe, _ = read_manifest(run)
    sizes = run_sizes(recipe, run)
    for size in sizes:
        if not (size.folder / "model" / "config.json").is_file():
            raise UserError(f"{run}: there is no model in {size.folder / 'model'} yet; let the run come to its end")
    device = choose_device(recipe.device)
    loaders: dict[str, _Loader] = {"dense": partial(_dense, run, recipe, device)}
    for size in sizes:
        name = size.name if len(sizes) > 1 else "pruned"
        loaders[name] = partial(_pruned, size.folder / "model", device)
    return loaders


def _dense(run: Path, recipe: Recipe, device: torch.device) -> tuple[DarwinLMForCausalLM, Any]:
    dense = load_dense(resolve(recipe.model), recipe.database.granularity, device)
    if dense.fingerprint != read_json(run / "manifest.json")["facts"]["model"]:
        raise UserError(f"{run}: {recipe.model!r} is another model now than the one that was pruned; bring it back")
    return dense.model.to(dense.dtype), dense.tokenizer  # type: ignore[arg-type]


def _one(source: str) -> tuple[DarwinLMForCausalLM, Any]:
    device = choose_device("auto")
    folder = resolve(source)
    if load_settings(folder)["model_type"] == DarwinLMConfig.model_type:
        return _pruned(Path(folder), device)
    dense = load_dense(folder, "kv_group", device)
    return dense.model.to(dense.dtype), dense.tokenizer  # type: ignore[arg-type]


def _pruned(folder: Path, device: torch.device) -> tuple[DarwinLMForCausalLM, Any]:
    model = load(folder, device=str(device))
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
