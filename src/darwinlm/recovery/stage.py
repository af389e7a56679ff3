"""The recovery stage of a step: refit, training, and the files needed to resume them."""

import shutil
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save

from darwinlm.config.recipe import RecoveryRecipe
from darwinlm.data.corpus import Corpus, TextStream
from darwinlm.data.tokens import Tokens
from darwinlm.database.prunable import Prunable, stored_weights
from darwinlm.models.cutting import assemble, build_model, pruned_config
from darwinlm.models.loading import DenseModel, fast_dtype
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.plan import Plan
from darwinlm.recovery.checkpoints import checkpoints, read_weights, remove_checkpoints, save_weights
from darwinlm.recovery.refit import refit_if_it_helps
from darwinlm.recovery.sharding import is_sharded
from darwinlm.recovery.teacher import CachedTeacher, load_teacher, write_predictions
from darwinlm.recovery.training import recover, steps_for
from darwinlm.run.directory import run_steps
from darwinlm.run.job import Job
from darwinlm.runtime import dist
from darwinlm.runtime.files import find_fault, read_json, write_bytes, write_json
from darwinlm.runtime.progress import log

SAMPLES = "samples"
"""Manifest key of a recovery: number of blocks read."""
_PREDICTIONS = "predictions"


def recover_size(job: Job, plan: Plan) -> None:
    """Refit and train `plan`, the recovery stage of a size, unless it is done or disabled."""
    run, stage, recipe = job.run, job.size.stage("recovery"), job.recipe
    if not run.done(job.size.stage("export")) or (job.step.last and not run.done(job.size.stage("evaluation"))):
        run.verify(stage)
    if not recipe.recovery.wanted or run.done(stage):
        return
    with run.stage(stage, job.size.folder / "recovery" / "weights.safetensors") as facts:
        read = _recover(job, plan, job.size.folder / "recovery")
        if recipe.steps > 1:
            facts[SAMPLES] = read


def _recover(job: Job, plan: Plan, folder: Path) -> int:
    """Write the trained weights to `folder`. Returns the number of blocks read.

    Every step except the last gets the same share of the tokens and the last step gets the rest. Each step continues in
    the text where the previous one stopped.
    """
    recipe, here, corpus, step = job.recipe, job.source, job.corpus, job.step
    dense = here.dense
    earlier = run_steps(recipe, job.run.path)[: step.number - 1]
    passed = sum(job.run.facts(one.stage("recovery")).get(SAMPLES, 0) for one in earlier)
    left = max(0, recipe.recovery.tokens - passed * recipe.data.sequence_length)
    wanted = recipe.recovery
    tokens = left if step.last else wanted.tokens // recipe.steps
    # Sharded tensors need not fit on one device.
    place = torch.device("cpu") if is_sharded(wanted) or tokens == 0 else dense.device
    model = _starting_model(here, corpus, plan, wanted, place, folder)
    # The teacher has its own dtype, and training needs the memory.
    dense.release()
    here.database.free()
    text: Tokens | TextStream = corpus.splits["train"]
    teacher = _teacher(dense, wanted, corpus, place, folder) if tokens > 0 and wanted.distillation > 0 else None
    if wanted.text == "stream":
        stopped = [file for one in earlier[-1:] if (file := one.folder / "recovery" / "text.json").exists()]
        begin = read_json(stopped[0]) if stopped else None
        text = TextStream(recipe.data, dense.tokenizer, recipe.seed, corpus.reserved, begin)
    model, done = recover(
        model, teacher, text, corpus.splits["validation"], wanted, seed=recipe.seed, folder=folder,
        device=dense.device, passed=passed, balance=dense.reference.balance, tokens=tokens,
    )  # fmt: skip
    # Other ranks may still be reading the best weights.
    dist.barrier()
    if dist.rank() == 0:
        history = {"loss": done.losses, "evaluations": done.evaluations, "taken": done.taken}
        write_json(folder / "losses.json", history, sealed=True)
        if not step.last and checkpoints(folder) and isinstance(text, TextStream):
            write_json(folder / "text.json", read_json(checkpoints(folder)[-1] / "text.json"))
        write_bytes(folder / "weights.safetensors", save(stored_weights(model, dense.dtype)))
        forget_recovery(folder)
    dist.barrier()
    return steps_for(tokens, wanted, recipe.data.sequence_length) * wanted.batch_size


def _starting_model(
    here: Prunable, corpus: Corpus, plan: Plan, recipe: RecoveryRecipe, place: torch.device, folder: Path
) -> PrunedModel:
    """Build the trainable model of `plan` on `place`, refitted if `recipe.refit_tokens` > 0.

    All intermediate tensors are freed on return, so that none stays in memory during training. A model that will be
    sharded is built by rank 0 and memory-mapped from its file by all ranks, so that a machine holds it once.
    """
    dense, database, refit_tokens = here.dense, here.database, recipe.refit_tokens
    if refit_tokens == 0 and not is_sharded(recipe):
        cuts = database.cuts(dense.sites, plan.levels, place)
        weights = dense.checkpoint.read(dense.shapes, place, torch.float32)
        return build_model(dense.config, dense.sites, weights, cuts, trainable=True)
    refitted = folder / "refit"
    with dist.main_first():
        if dist.rank() == 0 and (fault := find_fault(refitted)) is not None:
            if refitted.exists():
                log.warning("%s: refitting again", fault)
            model = dense.cut(database.cuts(dense.sites, plan.levels, dense.layers_device), trainable=True)
            if refit_tokens > 0:
                fitted, evaluated = corpus.splits["train"].first(refit_tokens), corpus.splits["validation"]
                refit_if_it_helps(model, dense.reference.model, fitted.input_ids_BT, evaluated.input_ids_BT)
            save_weights(refitted, stored_weights(model, torch.float32))
    tensors = {name: tensor.to(place) for name, tensor in read_weights(refitted).items()}
    cuts = database.cuts(dense.sites, plan.levels, torch.device("cpu"))
    return assemble(pruned_config(dense.config, dense.sites, cuts), tensors, trainable=True)


def _teacher(
    dense: DenseModel, recipe: RecoveryRecipe, corpus: Corpus, place: torch.device, folder: Path
) -> PrunedModel | CachedTeacher:
    """Load the dense model as the teacher, or cache its predictions."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    dtype, int8 = known.get(recipe.teacher_dtype, fast_dtype(dense.device)), recipe.teacher_dtype == "int8"
    if recipe.teacher_top_k == 0:
        return load_teacher(dense.reference, dtype, place, int8=int8, mapped=is_sharded(recipe))

    @cache
    def load() -> PrunedModel:
        return load_teacher(dense.reference, dtype, dense.device, int8=int8)

    text, validation = (
        write_predictions(
            load,
            corpus.splits[split],
            recipe.teacher_top_k,
            recipe.temperature,
            recipe.cut_documents,
            folder / _PREDICTIONS / split,
            dense.device,
        )
        for split in ("train", "validation")
    )
    return CachedTeacher(text, validation)


def forget_recovery(folder: Path) -> None:
    """Remove the files needed to resume an interrupted recovery."""
    remove_checkpoints(folder)
    for name in ("refit", _PREDICTIONS):
        shutil.rmtree(folder / name, ignore_errors=True)
