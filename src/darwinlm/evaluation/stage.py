"""The end of a run: evaluation of its models, and exports."""

import platform
from collections.abc import Mapping
from typing import Any

import torch

from darwinlm._version import __version__
from darwinlm.config.recipe import Recipe
from darwinlm.data.corpus import Corpus
from darwinlm.database.prunable import Prunable
from darwinlm.evaluation.measure import (
    SAMPLE_PROMPT,
    as_served,
    measure,
    moved_to,
    on_device,
    request_seconds,
    write_sample,
)
from darwinlm.export.card import model_card
from darwinlm.export.hf import export_hf
from darwinlm.export.targets import ENGINES, export_model
from darwinlm.models.device_memory import free_memory
from darwinlm.models.loading import DenseModel, served_dtype
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.plan import Budget, Plan
from darwinlm.run.directory import STEP, RunDirectory, Size
from darwinlm.runtime.files import read_json, write_json
from darwinlm.runtime.progress import log
from darwinlm.search.allocation import uniform_plan


def evaluate_and_export(
    recipe: Recipe,
    first: Prunable,
    here: Prunable,
    corpus: Corpus,
    budgets: tuple[Budget, Budget],
    plan: Plan,
    run: RunDirectory,
    size: Size,
) -> None:
    """Evaluate the models of a size, write the last of them, and export it; finished parts are skipped."""
    out, dense = size.folder, here.dense
    measured_file = out / "evaluation" / "measured.json"
    evaluated = run.done(f"{size.prefix}evaluation")
    if not (evaluated and run.done(f"{size.prefix}export")):
        models = {"dense": first.dense.model}
        # If they do not all fit on the device, the other models wait on the CPU.
        wait = torch.device("cpu")
        if not dense.offload and 4 * dense.compute_dtype.itemsize * here.space.parameters(plan.levels) < free_memory(
            dense.device
        ):
            wait = dense.device
        uniform = uniform_plan(first.space, budgets[1])
        if uniform is not None:
            models["uniform"] = moved_to(first.cut(uniform), wait)
        if here is not first:
            models[f"{STEP}{recipe.steps - 1}"] = dense.model
        models["found"] = moved_to(here.cut(plan), wait)
        if recipe.recovery.wanted:
            models["recovered"] = moved_to(here.result(recipe, plan, size.folder), wait)
        last = models[next(reversed(models))]
        if not evaluated:
            with run.stage(f"{size.prefix}evaluation", measured_file):
                write_json(measured_file, _measure(recipe, dense, corpus, budgets[0], plan, models, size), sealed=True)
        with run.stage(f"{size.prefix}export", out / "model"):
            as_json = plan.to_dict(here.space)
            export_hf(last, dense, as_json, model_card(recipe, as_json, read_json(measured_file)), out / "model")
    for target in recipe.export.targets:
        if not run.done(f"{size.prefix}{target}"):
            with run.stage(f"{size.prefix}{target}") as facts:
                parallel = recipe.export.tensor_parallel if ENGINES[target].tensor_parallel else 1
                exported = export_model(out, target, tensor_parallel=parallel)
                facts["proof"] = str(exported.proof) if exported.proof else None
            for line in exported.lines():
                log.info("%s", line)
    log.info("done: %s", out / "model")


def _measure(
    recipe: Recipe,
    dense: DenseModel,
    corpus: Corpus,
    budget: Budget,
    plan: Plan,
    models: Mapping[str, PrunedModel],
    size: Size,
) -> dict[str, Any]:
    """Return the content of `measured.json`; the last of `models` is the result."""
    rows = measure(models, corpus.blocks["held_out"], recipe.evaluation, dense.dtype)
    last = models[list(models)[-1]]
    sample = {"prompt": SAMPLE_PROMPT, "before": write_sample(dense.reference.model, dense.tokenizer)}
    with on_device(last, dense.device):
        sample["after"] = write_sample(last, dense.tokenizer)
    limits: list[dict[str, Any]] = [
        {"name": limit.name, "unit": limit.unit, "dense": limit.dense, "found": limit.cost(plan.levels)}
        for limit in budget.limits
    ]
    for limit in limits:
        if limit["name"] == "latency":
            timed = as_served({name: models[name] for name in ("dense", "found")}, dense.dtype)
            seconds = request_seconds(timed, recipe.workload, recipe.evaluation.repeats)
            limit["measured"] = {name: round(1e9 * sum(parts)) for name, parts in seconds.items()}
    return {
        "model": recipe.model,
        "target": size.name,
        "rows": rows,
        "limits": limits,
        "sample": sample,
        "environment": _environment(dense),
        "seed": recipe.seed,
    }


def _environment(dense: DenseModel) -> dict[str, Any]:
    """Return the hardware and versions that the reported numbers depend on."""
    import transformers

    device = dense.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {
        "device": name,
        "speed_dtype": str(served_dtype(dense.dtype, device)).removeprefix("torch."),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "darwinlm": __version__,
    }
