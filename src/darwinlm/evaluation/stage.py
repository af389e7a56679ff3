"""The end of a run: evaluation of its models, and exports."""

import platform
from collections.abc import Mapping
from typing import Any

import torch

from darwinlm._version import __version__
from darwinlm.evaluation.measure import (
    REPEATS,
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
from darwinlm.plan import Plan
from darwinlm.run.job import Job
from darwinlm.runtime.files import read_json, write_json
from darwinlm.runtime.progress import log
from darwinlm.search.allocation import uniform_plan


def evaluate_and_export(job: Job, plan: Plan) -> None:
    """Evaluate the models of a size, write the last of them, and export it; finished stages are skipped.

    In all steps except the last, the model is only written: it is the input of the next step.
    """
    if job.step.last:
        _evaluate(job, plan)
        _export(job)
    elif not job.run.done(job.size.stage("export")):
        card = f"# The model after {job.size.name} of {job.recipe.steps}, the input of the next step\n"
        _write(job, job.result(plan), plan, card)


def waiting_device(dense: DenseModel, parameters: int) -> torch.device:
    """Return the device of models of `parameters` parameters that wait for their evaluation: the CPU if they do not all
    fit on the dense model's device."""
    room = not dense.offload and 4 * dense.compute_dtype.itemsize * parameters < free_memory(dense.device)
    return dense.device if room else torch.device("cpu")


def _write(job: Job, model: PrunedModel, plan: Plan, card: str) -> None:
    folder = job.size.folder / "model"
    with job.run.stage(job.size.stage("export"), folder):
        export_hf(model, job.source.dense, plan.to_dict(job.source.space), card, folder)


def _evaluate(job: Job, plan: Plan) -> None:
    recipe, run, first, here, size = job.recipe, job.run, job.original, job.source, job.size
    dense, measured_file = here.dense, size.folder / "evaluation" / "measured.json"
    evaluated = run.done(size.stage("evaluation"))
    if not (evaluated and run.done(size.stage("export"))):
        models = {"dense": first.dense.model}
        wait = waiting_device(dense, here.space.parameters(plan.levels))
        uniform = uniform_plan(first.space, job.original_budget)
        if uniform is not None:
            models["uniform"] = moved_to(first.cut(uniform), wait)
        if here is not first:
            models[f"step {recipe.steps - 1}"] = dense.model
        models["found"] = moved_to(here.cut(plan), wait)
        if recipe.recovery.wanted:
            models["recovered"] = moved_to(job.result(plan), wait)
        last = models[next(reversed(models))]
        if not evaluated:
            with run.stage(size.stage("evaluation"), measured_file):
                write_json(measured_file, _measure(job, plan, models), sealed=True)
        _write(job, last, plan, model_card(recipe, plan.to_dict(here.space), read_json(measured_file)))


def _export(job: Job) -> None:
    export, out = job.recipe.export, job.size.folder
    for target in export.targets:
        if not job.run.done(job.size.stage(target)):
            with job.run.stage(job.size.stage(target)) as facts:
                parallel = export.tensor_parallel if ENGINES[target].tensor_parallel else 1
                exported = export_model(out, target, tensor_parallel=parallel)
                facts["proof"] = str(exported.proof) if exported.proof else None
            for line in exported.lines():
                log.info("%s", line)
    log.info("done: %s", out / "model")


def _measure(job: Job, plan: Plan, models: Mapping[str, PrunedModel]) -> dict[str, Any]:
    """Return the content of `measured.json`; the last of `models` is the result."""
    recipe, dense = job.recipe, job.source.dense
    rows = measure(models, job.corpus.splits["test"].input_ids_BT, recipe.workload, dense.dtype)
    last = models[list(models)[-1]]
    sample = {"prompt": SAMPLE_PROMPT, "before": write_sample(dense.reference.model, dense.tokenizer)}
    with on_device(last, dense.device):
        sample["after"] = write_sample(last, dense.tokenizer)
    limits: list[dict[str, Any]] = [
        {"name": limit.name, "unit": limit.unit, "dense": limit.dense, "found": limit.cost(plan.levels)}
        for limit in job.budget.limits
    ]
    for limit in limits:
        if limit["name"] == "latency":
            timed = as_served({name: models[name] for name in ("dense", "found")}, dense.dtype)
            seconds = request_seconds(timed, recipe.workload)
            limit["measured"] = {name: round(1e9 * sum(parts)) for name, parts in seconds.items()}
    return {
        "model": recipe.model,
        "target": job.size.name,
        "rows": rows,
        "limits": limits,
        "request": recipe.workload.timed.model_dump() | {"repeats": REPEATS},
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
