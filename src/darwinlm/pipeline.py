"""The whole flow on one page: text, database, search, recovery, evaluation, export, report."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from darwinlm.config.loading import load_recipe
from darwinlm.config.recipe import Recipe
from darwinlm.database.prunable import Prunable
from darwinlm.evaluation.stage import evaluate_and_export
from darwinlm.export.targets import check_targets, sites_kept_for
from darwinlm.models.loading import choose_device
from darwinlm.recovery.stage import recover_size
from darwinlm.recovery.training import check_recovery
from darwinlm.report.page import refresh_report
from darwinlm.run.directory import RunDirectory, is_run, run_steps
from darwinlm.run.finished import Run
from darwinlm.run.job import Job
from darwinlm.run.lock import RunLock
from darwinlm.run.prepare import check_memory, load_original, load_result, open_run, prepare_database
from darwinlm.runtime import dist
from darwinlm.runtime.determinism import same_bits
from darwinlm.runtime.files import read_json
from darwinlm.runtime.memory import naming_memory_faults
from darwinlm.search.budgets import budgets_of
from darwinlm.search.modes import streams_layers, wants_uniform
from darwinlm.search.stage import search_size


def prune(
    model: str | Path,
    *,
    target: float | str,
    out: str | Path,
    recipe: str | Path = "quick",
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Prune a model to a given size, or resume an interrupted run with the same settings.

    Args:
        model: local folder or Hub model id.
        target: fraction of parameters to keep (0.5), or a number of them ("2.7B").
        out: run directory: new, empty, or an earlier run.
        recipe: name of a built-in recipe, or a YAML file.
        settings: changes to the recipe, such as `{"search.offspring": 8}`.

    Returns:
        The finished run.

    Raises:
        UserError: if the input is not valid; the message is one line with what is wrong and what to do.
    """
    overrides = {"model": str(model), "target": target, **(settings or {})}
    return run_recipe(load_recipe(recipe, overrides), Path(out))


@dist.naming_lost_ranks()
def run_recipe(recipe: Recipe, out: Path) -> Run:
    """Run every unfinished stage of `recipe` in the run directory `out`. Raises UserError.

    With torchrun all ranks share the work of database, search and training; rank 0 runs the other stages.
    """
    dist.start()
    device = dist.local_device(choose_device(recipe.device))
    RunDirectory.check(out, recipe)
    with same_bits(recipe.deterministic), RunLock(out) as lock:
        if dist.rank() == 0 and is_run(out):
            lock.take()
        dist.barrier()
        with naming_memory_faults("loading the model"):
            _run_stages(recipe, device, out, lock)
    return Run(out, read_json(out / "report" / "metrics.json"))


def _run_stages(recipe: Recipe, device: torch.device, out: Path, lock: RunLock) -> None:
    torch.manual_seed(recipe.seed)
    dense = load_original(recipe, device)
    check_targets(recipe.export.targets, dense)
    check_recovery(recipe.recovery)
    uniform = wants_uniform(recipe, dense)
    dense = replace(dense, offload=streams_layers(recipe, dense, uniform))
    if not (out / "report" / "metrics.json").exists():
        check_memory(recipe, dense)
    with dist.main_first():
        run, corpus = open_run(recipe, dense, out, lock)

    original: Prunable | None = None
    for step in run_steps(recipe, out):
        source = prepare_database(recipe, dense, corpus, step, run, sites_kept_for(recipe.export.targets))
        original = original or source
        larger: Path | None = None
        for size in step.sizes:
            budgets = budgets_of(recipe, original, source, step, size)
            job = Job(recipe, run, corpus, original, source, step, size, *budgets, uniform)
            plan = search_size(job, larger)
            recover_size(job, plan)
            with dist.main_first():
                if dist.rank() == 0:
                    evaluate_and_export(job, plan)
            larger = size.folder / "search"
        if not step.last:
            dense = load_result(recipe, step.folder / "model", original.dense)
    if dist.rank() == 0:
        refresh_report(out)
    dist.barrier()
