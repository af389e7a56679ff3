"""The whole flow on one page: corpus, database, search, recovery, evaluation, export, report."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from darwinlm._version import __version__
from darwinlm.config.loading import change_recipe, differences, load_recipe
from darwinlm.config.recipe import Recipe
from darwinlm.config.target import parse_target, split_targets
from darwinlm.data.corpus import SPLITS, Corpus, load_corpus, needed_blocks, pack, read_corpus, save_corpus
from darwinlm.data.self_text import write_documents
from darwinlm.database.build import build_database
from darwinlm.database.levels import check_tensor_parallel
from darwinlm.database.prunable import Prunable
from darwinlm.database.store import Database
from darwinlm.errors import UserError
from darwinlm.evaluation.stage import evaluate_and_export
from darwinlm.export.hf import export_hf
from darwinlm.export.targets import TARGETS, check_targets, sites_kept_for
from darwinlm.models.device_memory import free_memory, kept_bytes
from darwinlm.models.families import is_hybrid, sites_needed
from darwinlm.models.loading import DenseModel, choose_device, fast_dtype, load_dense
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.models.pruned import load
from darwinlm.models.smollm2 import resolve
from darwinlm.plan import Budget, Limit, Plan, check_target, make_budget
from darwinlm.recovery.stage import SAMPLES, forget_recovery, recover_plan
from darwinlm.recovery.training import check_recovery
from darwinlm.report.page import write_report
from darwinlm.run.directory import VERSION, RunDirectory, Size, Step, is_run, run_steps
from darwinlm.run.lock import RunLock
from darwinlm.runtime import dist
from darwinlm.runtime.determinism import same_bits
from darwinlm.runtime.files import file_checksum, read_json
from darwinlm.runtime.memory import check_room, naming_memory_faults
from darwinlm.runtime.progress import Phases, log
from darwinlm.search.budgets import resource_limits
from darwinlm.search.stage import search_plan


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    """Run directory."""
    metrics: Mapping[str, Any]
    """Content of `report/metrics.json`."""

    @property
    def model_path(self) -> Path:
        """Folder of the pruned model."""
        return self.path / "model"

    def load(self) -> PrunedModel:
        """Load the pruned model.

        Returns:
            The result of `darwinlm.load` for `model_path`.

        Raises:
            UserError: if its files are damaged or missing.
        """
        return load(self.model_path)


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
def recover_again(run: str | Path, settings: Mapping[str, Any] | None = None) -> Run:
    """Repeat the recovery of a run with other `recovery` settings, or resume it if nothing changes.

    Args:
        run: run directory.
        settings: changes to the run's recipe, such as `{"recovery.tokens": "1B"}`; only `recovery` can change.

    Returns:
        The finished run.

    Raises:
        UserError: if the input is not valid; the message is one line with what is wrong and what to do.
    """
    dist.start()
    out = Path(run)
    before = RunDirectory.recipe_of(out)
    after = change_recipe(before, dict(settings or {}))
    changed = differences(before, after)
    others = [line for line in changed if not line.startswith("recovery.")]
    if others:
        raise UserError(f"{out}: recover cannot change {'; '.join(others)}; start a new run with `darwinlm prune`")
    dist.barrier()
    if changed and dist.rank() == 0:
        with RunLock(out) as lock:
            lock.take()
            for folder in (out / "recovery", *out.glob("sizes/*/recovery")):
                forget_recovery(folder)
            RunDirectory.change_recipe(out, after, ("recovery", "evaluation", "export", *TARGETS))
    dist.barrier()
    return run_recipe(after, out)


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
            return _run_stages(recipe, device, out, lock)


def _run_stages(recipe: Recipe, device: torch.device, out: Path, lock: RunLock) -> Run:
    torch.manual_seed(recipe.seed)
    units = recipe.database
    dense = load_dense(resolve(recipe.model), units.granularity, device, expert_unit=units.experts)
    if units.experts == "channels" and not any(site.routed for site in dense.sites):
        raise UserError(f"database.experts=channels: model {recipe.model!r} has no experts; remove the setting")
    _check_length(recipe, dense)
    check_targets(recipe.export.targets, dense)
    if recipe.recovery.cut_documents and is_hybrid(dense.config):
        raise UserError(
            f"recovery.cut_documents: {recipe.model!r} has linear attention, whose state carries over from one "
            "document to the next; set it to false"
        )
    check_tensor_parallel(dense.sites, recipe.export.tensor_parallel)
    check_recovery(recipe.recovery)
    uniform = _wants_uniform(recipe, dense)
    dense = replace(dense, offload=_offloads(recipe, dense, uniform))
    steps = run_steps(recipe, out)
    for size in steps[-1].sizes:
        if "params" in size.target:
            check_target("params", size.target["params"], dense=dense.parameters, smallest=dense.fixed_parameters)
    if not (out / "report" / "metrics.json").exists():
        dtype = dense.compute_dtype
        what = f"model {recipe.model!r} in {str(dtype).split('.')[1]}"
        # Streamed layers are read from their files as needed, and a candidate needs less than the whole model.
        check_room(dtype.itemsize * dense.parameters, dense.layers_device, what)
    with dist.main_first():
        run, corpus = _begin(recipe, dense, out, lock)

    first: Prunable | None = None
    for step in steps:
        if first is not None:
            source = str(steps[step.number - 2].folder / "model")
            dense = load_dense(source, units.granularity, device, first.dense, expert_unit=units.experts)
            dense = replace(dense, offload=first.dense.offload)
        here = Prunable(dense, _database(recipe, dense, corpus, step, run))
        first = first or here
        larger: Path | None = None
        for size in step.sizes:
            budgets = _budgets(recipe, first, here, step, size)
            _run_size(recipe, uniform, first, here, corpus, budgets, step, size, run, larger)
            larger = size.folder / "search" if recipe.search.descent_rounds > 0 else None
    if dist.rank() == 0:
        _report(out)
    dist.barrier()
    return Run(out, read_json(out / "report" / "metrics.json"))


def _database(recipe: Recipe, dense: DenseModel, corpus: Corpus, step: Step, run: RunDirectory) -> Database:
    folder = step.folder / "database"
    if not run.done(f"{step.prefix}database"):
        phases = Phases(lambda: _synchronise(dense.device))
        with run.stage(f"{step.prefix}database") as facts:
            tokens_BT, parallel = corpus.blocks["calibration"], recipe.export.tensor_parallel
            build_database(dense, tokens_BT, recipe.database, folder, phases, parallel)
            facts["seconds_by_phase"] = {name: round(seconds, 3) for name, seconds in phases.seconds.items()}
    return Database(folder, kept=sites_kept_for(recipe.export.targets) | sites_needed(dense.config, dense.sites))


def _budgets(recipe: Recipe, first: Prunable, here: Prunable, step: Step, size: Size) -> tuple[Budget, Budget]:
    """Return the budget of plans in this step, and the budget of `size` for plans of the original model.

    Fractions refer to the original model.
    """

    def limits(material: Prunable) -> dict[str, Limit]:
        latencies = step.folder / "search" / "latency.json"
        return resource_limits(material.dense, material.space, size.target, recipe.workload, latencies)

    whole = limits(first)
    own = whole
    if here is not first:
        own = {name: replace(limit, reference=whole[name].dense) for name, limit in limits(here).items()}
    return make_budget(size.target, own, step.number / recipe.steps), make_budget(size.target, whole)


def _run_size(
    recipe: Recipe,
    uniform: bool,
    first: Prunable,
    here: Prunable,
    corpus: Corpus,
    budgets: tuple[Budget, Budget],
    step: Step,
    size: Size,
    run: RunDirectory,
    larger: Path | None,
) -> None:
    """Run the unfinished stages of one size: search, recovery, evaluation and export."""
    search_folder = size.folder / "search"
    if not run.done(f"{size.prefix}search"):
        found = search_folder / "best_plan.json", search_folder / "history.jsonl"
        with run.stage(f"{size.prefix}search", *found):
            search_plan(
                here.dense, here.database, corpus, budgets[0], recipe.search, recipe.seed, search_folder, larger,
                uniform=uniform,
            )  # fmt: skip
            dist.barrier()
    plan = Plan.from_dict(read_json(search_folder / "best_plan.json"), here.space)
    last = step.number == recipe.steps
    if not (run.done(f"{size.prefix}export") and (run.done(f"{size.prefix}evaluation") or not last)):
        run.verify(f"{size.prefix}recovery")
    if recipe.recovery.wanted and not run.done(f"{size.prefix}recovery"):
        with run.stage(f"{size.prefix}recovery", size.folder / "recovery" / "weights.safetensors") as facts:
            taken = recover_plan(recipe, here, corpus, plan, step, size.folder / "recovery", run)
            if recipe.steps > 1:
                facts[SAMPLES] = taken
    with dist.main_first():
        if dist.rank() == 0:
            if last:
                evaluate_and_export(recipe, first, here, corpus, budgets, plan, run, size)
            elif not run.done(f"{size.prefix}export"):
                with run.stage(f"{size.prefix}export", size.folder / "model"):
                    card = f"# The model after step {step.number} of {recipe.steps}, the input of the next step\n"
                    model = here.result(recipe, plan, size.folder)
                    export_hf(model, here.dense, plan.to_dict(here.space), card, size.folder / "model")


def _report(out: Path) -> None:
    """Write the report; damaged files that only the report shows do not make a finished run fail."""
    try:
        write_report(out)
    except UserError as error:
        if not (out / "report" / "metrics.json").exists():
            raise
        log.warning("report not updated: %s", str(error).split("; ")[0])


def _check_length(recipe: Recipe, dense: DenseModel) -> None:
    longest, context = recipe.data.sequence_length, dense.config.max_position_embeddings
    if longest > context:
        raise UserError(f"data.sequence_length={longest} exceeds the model's maximum of {context} positions; lower it")


def _offloads(recipe: Recipe, dense: DenseModel, uniform: bool) -> bool:
    """Return whether to stream layers through the device, equal on all ranks, and log what is not streamed.

    Raises:
        UserError: if the recipe or model does not support it.
    """
    search = recipe.search.model_copy(update={"descent_rounds": 0}) if uniform else recipe.search
    size, accelerator = dense.compute_dtype.itemsize * dense.parameters, dense.device.type == "cuda"
    length = recipe.data.sequence_length
    kept = kept_bytes(dense.config, length, length, fast_dtype(dense.device))
    passes = search.offloads(size, kept, free_memory(dense.device), accelerator=accelerator)
    passes = dist.gather(passes)[0]
    if not passes:
        return False
    if dense.balance > 0 and search.trains:
        if search.offload == "cpu":
            raise UserError(
                "search.offload=cpu: trials cannot add the load-balancing loss that the checkpoint enables; "
                "set output_router_logits to false in its config.json"
            )
        return False
    if any("latency" in parse_target(target) for target in split_targets(recipe.target)):
        raise UserError(
            "a latency target needs the model's layers on the device for timing; set search.offload=device, or "
            "limit flops instead"
        )
    log.info(
        "search: layers are kept in CPU memory and streamed through %s one at a time (search.offload=%s)",
        *(dense.device, search.offload),
    )
    if recipe.data.source == "self" and accelerator:
        log.warning(
            "data.source=self generates text with the model, streaming all layers for each token, which is "
            "slow: set data.source to a text"
        )
    recovery = recipe.recovery
    if accelerator and recovery.tokens > 0 and recovery.sharding == "none" and recovery.lora_rank == 0:
        log.warning(
            "recovery does not stream layers: it needs 16 bytes per parameter on %s; see darwinlm plan, or set "
            "recovery.lora_rank, recovery.sharding=fsdp or recovery.tokens=0",
            dense.device,
        )
    return True


def _wants_uniform(recipe: Recipe, dense: DenseModel) -> bool:
    """Return whether all layers get the same sizes.

    Raises:
        UserError: if an already pruned model has layers that no plan can make uniform.
    """
    if not recipe.wants_uniform(experts=any(site.routed for site in dense.sites)):
        return False
    shapes = {(site.kind, site.size, site.num_units, site.experts) for site in dense.sites}
    kinds = {(site.kind, site.size) for site in dense.sites}
    lacking = any(dense.config.skipped(layer) for layer in range(dense.config.num_hidden_layers))
    alike = len(shapes) == len(kinds) and not lacking
    if not alike and (recipe.search.uniform is True or recipe.export.one_size):
        raise UserError(
            f"model {recipe.model!r}: its layers already differ in size, so search.uniform=true cannot make "
            "them uniform; remove the setting, or start from the dense model"
        )
    if alike and recipe.search.uniform == "auto":
        log.info(
            "search: all layers get the same sizes, so that other engines than transformers can run the "
            "result; search.uniform=false allows different sizes"
        )
    return alike


def _begin(recipe: Recipe, dense: DenseModel, out: Path, lock: RunLock) -> tuple[RunDirectory, Corpus]:
    """Open the run directory, and read or write the text. A new run is locked as soon as its folder exists."""
    corpus_file = out / "corpus.safetensors"
    corpus = None
    if recipe.data.source != "self" and not corpus_file.exists():
        # Read before the run directory exists, so that invalid data leaves nothing behind.
        corpus = _read_text(recipe, dense)
    if dist.rank() == 0:
        lock.take()
    run = RunDirectory.open(out, recipe, {"model": dense.fingerprint, VERSION: __version__})
    if dist.rank() == 0:
        _verify(run, recipe)
    if not run.done("corpus"):
        before = run.outputs("corpus")
        with run.stage("corpus", corpus_file):
            if corpus is None:
                corpus = _own_text(dense, recipe) if recipe.data.source == "self" else _read_text(recipe, dense)
            save_corpus(corpus, corpus_file)
            if before and file_checksum(corpus_file) != before[corpus_file.name]:
                corpus_file.unlink()
                raise UserError(
                    f"{corpus_file} was damaged, and data {recipe.data.source!r} no longer yields the same "
                    "text; restore it, or start a new run in a new folder"
                )
    return run, load_corpus(corpus_file)


def _verify(run: RunDirectory, recipe: Recipe) -> None:
    """Verify the files of an earlier run once; damaged ones are reported and recreated by their stage."""
    for step in run_steps(recipe, run.path):
        folder, stage = step.folder / "database", f"{step.prefix}database"
        index = folder / "index.json"
        if index.exists():
            try:
                read_json(index)
            except UserError:
                if not os.access(index, os.R_OK):
                    raise
                log.warning("%s is damaged: rebuilding the database", index)
                index.unlink()
        elif run.done(stage):
            log.warning("%s is missing: rebuilding the database", index)
        damaged = Database(folder).forget_damaged()
        for file in damaged:
            log.warning("%s is damaged or missing: rebuilding its site", file)
        if damaged or not index.exists():
            run.undo(stage)
    for stage in list(run.manifest["stages"]):
        # Trained weights are verified when they are needed; with an intact model they are not.
        if not stage.endswith("recovery"):
            run.verify(stage)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read_text(recipe: Recipe, dense: DenseModel) -> Corpus:
    corpus = read_corpus(recipe.data, dense.tokenizer, recipe.seed)
    highest = max(int(blocks_BT.max()) for blocks_BT in corpus.blocks.values())
    if highest >= dense.config.vocab_size:
        raise UserError(
            f"model {recipe.model!r}: its tokenizer produces the id {highest}, but it has only "
            f"{dense.config.vocab_size} embeddings; the tokenizer belongs to another model"
        )
    return corpus


def _own_text(dense: DenseModel, recipe: Recipe) -> Corpus:
    length = recipe.data.sequence_length
    # Each split ends with a whole document; the part that does not fit is discarded.
    tokens = sum(needed_blocks(recipe.data).values()) * length + len(SPLITS) * length
    return pack(write_documents(dense, tokens=tokens, longest=length, seed=recipe.seed), recipe.data)
