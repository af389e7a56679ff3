"""The whole flow on one page: corpus, database, search, recovery, evaluation, export, report."""

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save
from torch import Tensor

import darwinlm
from darwinlm import dist
from darwinlm.adapters.cutting import assemble, build_model, copy_trained, pruned_config
from darwinlm.adapters.loading import (
    DenseModel,
    choose_device,
    fast_dtype,
    load_dense,
)
from darwinlm.adapters.memory import free_memory
from darwinlm.adapters.modeling_darwinlm import DarwinLMForCausalLM
from darwinlm.data import SPLITS, Corpus, TextStream, load_corpus, needed_blocks, pack, read_corpus, save_corpus
from darwinlm.database.build import build_database
from darwinlm.database.levels import check_tensor_parallel
from darwinlm.database.store import Database
from darwinlm.demo import resolve
from darwinlm.determinism import same_bits
from darwinlm.errors import UserError
from darwinlm.evaluation.measure import SAMPLE_PROMPT, as_stored, measure, request_seconds, visiting, write_sample
from darwinlm.export.card import model_card
from darwinlm.export.hf import export_hf, load
from darwinlm.export.targets import check_targets, export_model, sites_kept_for
from darwinlm.files import (
    STEP,
    RunDirectory,
    Size,
    Step,
    file_checksum,
    find_fault,
    read_json,
    read_tensors,
    run_steps,
    write_bytes,
    write_json,
)
from darwinlm.lock import RunLock
from darwinlm.memory import check_room, naming_memory_faults
from darwinlm.plan import Budget, Limit, Plan, Space, check_target, make_budget
from darwinlm.progress import Phases, log
from darwinlm.recipe import Recipe, Target, change_recipe, differences, load_recipe
from darwinlm.recovery.checkpoints import checkpoints, read_weights, remove_checkpoints, save_weights
from darwinlm.recovery.refit import refit_if_it_helps
from darwinlm.recovery.stage import recover, steps_for
from darwinlm.report.page import write_report
from darwinlm.search.allocation import uniform_plan
from darwinlm.search.resources import resource_limits
from darwinlm.search.stage import search_plan
from darwinlm.self_text import write_documents

_SAMPLES = "samples"
"""In the manifest, of a recovery: how many blocks it has read."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    metrics: Mapping[str, Any]
    """What `report/metrics.json` holds."""

    @property
    def model_path(self) -> Path:
        """The folder of the pruned model."""
        return self.path / "model"

    def load(self) -> DarwinLMForCausalLM:
        """The pruned model."""
        return load(self.model_path)


def prune(
    model: str | Path,
    *,
    target: float | str,
    out: str | Path,
    recipe: str | Path = "quick",
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Prune a model to a size, or go on with an interrupted run of the same settings.

    Args:
        model: a local folder or a Hub id.
        target: the fraction of parameters to keep (0.5), or a count of them ("2.7B").
        out: the run directory: new, empty, or an earlier run.
        recipe: the name of a built-in recipe, or a YAML file.
        settings: changes to the recipe, `{"search.offspring": 8}`.

    Raises:
        UserError: with one line that says what is wrong and what to do.
    """
    overrides = {"model": str(model), "target": target, **(settings or {})}
    return run_recipe(load_recipe(recipe, overrides), Path(out))


def recover_again(run: str | Path, settings: Mapping[str, Any] | None = None) -> Run:
    """Train the plans that a run has found, with other settings of `recovery` than before; go on if nothing changes.

    Args:
        run: the run directory.
        settings: changes to the run's recipe, `{"recovery.tokens": "1B"}`; nothing but `recovery` can change.

    Raises:
        UserError: with one line that says what is wrong and what to do.
    """
    dist.start()
    out = Path(run)
    before = RunDirectory.recipe_of(out)
    after = change_recipe(before, dict(settings or {}))
    changed = differences(before, after)
    others = [line for line in changed if not line.startswith("recovery.")]
    if others:
        raise UserError(f"{out}: recover cannot change {'; '.join(others)}; name a new run with `darwinlm prune`")
    dist.barrier()
    if changed and dist.rank() == 0:
        with RunLock(out) as lock:
            lock.take()
            for folder in (out / "recovery", *out.glob("sizes/*/recovery")):
                _forget_recovery(folder)
            RunDirectory.change_recipe(out, after, ("recovery", "evaluation", "export", *get_args(Target)))
    dist.barrier()
    return run_recipe(after, out)


def run_recipe(recipe: Recipe, out: Path) -> Run:
    """Run every stage of `recipe` that is not done yet in the run directory `out`. Raises UserError.

    Under torchrun all ranks build the database, search and train together; the other stages are rank 0's.
    """
    dist.start()
    device = dist.local_device(choose_device(recipe.device))
    RunDirectory.check(out, recipe)
    with same_bits(recipe.deterministic), RunLock(out) as lock:
        if dist.rank() == 0 and (out / "manifest.json").exists():
            lock.take()
        dist.barrier()
        with naming_memory_faults("loading the model"):
            return _run_stages(recipe, device, out, lock)


def _run_stages(recipe: Recipe, device: torch.device, out: Path, lock: RunLock) -> Run:
    torch.manual_seed(recipe.seed)
    dense = load_dense(resolve(recipe.model), recipe.database.granularity, device)
    _check_length(recipe, dense)
    check_targets(recipe.export.targets, dense)
    check_tensor_parallel(dense.sites, recipe.export.tensor_parallel)
    _check_alike(recipe, dense)
    steps = run_steps(recipe, out)
    for size in steps[-1].sizes:
        if "params" in size.target:
            check_target("params", size.target["params"], dense=dense.parameters, smallest=dense.fixed_parameters)
    if not (out / "report" / "metrics.json").exists():
        dtype = dense.compute_dtype
        check_room(dtype.itemsize * dense.parameters, device, f"model {recipe.model!r} in {str(dtype).split('.')[1]}")
    with dist.main_first():
        run, corpus = _begin(recipe, dense, out, lock)

    first: Material | None = None
    for step in steps:
        if first is not None:
            source = str(steps[step.number - 2].folder / "model")
            dense = load_dense(source, recipe.database.granularity, device, cut_from=first.dense)
        here = Material(dense, _database(recipe, dense, corpus, step, run))
        first = first or here
        larger: Path | None = None
        for size in step.sizes:
            budgets = _budgets(recipe, first, here, step, size)
            _run_size(recipe, first, here, corpus, budgets, step, size, run, larger)
            larger = size.folder / "search" if recipe.search.descent_rounds > 0 else None
    if dist.rank() == 0:
        _report(out)
    dist.barrier()
    return Run(out, read_json(out / "report" / "metrics.json"))


@dataclass(frozen=True)
class Material:
    """What a step cuts plans out of."""

    dense: DenseModel
    """The model that the run began with or, in later steps, what the step before has left."""
    database: Database

    @property
    def space(self) -> Space:
        """The search space."""
        return self.database.space(self.dense.sites)


def _database(recipe: Recipe, dense: DenseModel, corpus: Corpus, step: Step, run: RunDirectory) -> Database:
    folder = step.folder / "database"
    if not run.done(f"{step.prefix}database"):
        phases = Phases(lambda: _synchronise(dense.device))
        with run.stage(f"{step.prefix}database") as facts:
            tokens_BT, parallel = corpus.blocks["calibration"], recipe.export.tensor_parallel
            build_database(dense, tokens_BT, recipe.database, folder, phases, parallel)
            facts["seconds_by_phase"] = {name: round(seconds, 3) for name, seconds in phases.seconds.items()}
    return Database(folder, kept=sites_kept_for(recipe.export.targets))


def _budgets(recipe: Recipe, first: Material, here: Material, step: Step, size: Size) -> tuple[Budget, Budget]:
    """What plans of this step must meet, and what those of the first model would have to meet to be of `size`.

    Fractions are of the model that the run began with.
    """

    def limits(material: Material) -> dict[str, Limit]:
        latencies = step.folder / "search" / "latency.json"
        return resource_limits(material.dense, material.space, size.target, recipe.workload, latencies)

    whole = limits(first)
    own = whole
    if here is not first:
        own = {name: replace(limit, reference=whole[name].dense) for name, limit in limits(here).items()}
    return make_budget(size.target, own, step.number / recipe.steps), make_budget(size.target, whole)


def _run_size(
    recipe: Recipe,
    first: Material,
    here: Material,
    corpus: Corpus,
    budgets: tuple[Budget, Budget],
    step: Step,
    size: Size,
    run: RunDirectory,
    larger: Path | None,
) -> None:
    """Search, recovery and export of one size, and its evaluation, if they are not done yet."""
    search_folder = size.folder / "search"
    if not run.done(f"{size.prefix}search"):
        found = search_folder / "best_plan.json", search_folder / "history.jsonl"
        with run.stage(f"{size.prefix}search", *found):
            search_plan(
                here.dense, here.database, corpus, budgets[0], recipe.search, recipe.seed, search_folder, larger
            )
            dist.barrier()
    plan = Plan.from_dict(read_json(search_folder / "best_plan.json"), here.space)
    last = step.number == recipe.steps
    if not (run.done(f"{size.prefix}export") and (run.done(f"{size.prefix}evaluation") or not last)):
        run.verify(f"{size.prefix}recovery")
    if recipe.recovery.wanted and not run.done(f"{size.prefix}recovery"):
        with run.stage(f"{size.prefix}recovery", size.folder / "recovery" / "weights.safetensors") as facts:
            taken = _recover(recipe, here, corpus, plan, step, size.folder / "recovery", run)
            if recipe.steps > 1:
                facts[_SAMPLES] = taken
    with dist.main_first():
        if dist.rank() == 0:
            if last:
                _evaluate_and_export(recipe, first, here, corpus, budgets, plan, run, size)
            elif not run.done(f"{size.prefix}export"):
                with run.stage(f"{size.prefix}export", size.folder / "model"):
                    card = f"# The model after step {step.number} of {recipe.steps}, which the next step cuts\n"
                    model = _result(recipe, here, plan, size)
                    export_hf(model, here.dense, plan.to_dict(here.space), card, size.folder / "model")


def _report(out: Path) -> None:
    """Write the report; what is only shown there and damaged does not make a finished run fail."""
    try:
        write_report(out)
    except UserError as error:
        if not (out / "report" / "metrics.json").exists():
            raise
        log.warning("the report stays as it was: %s", str(error).split("; ")[0])


def _check_length(recipe: Recipe, dense: DenseModel) -> None:
    longest, context = recipe.data.sequence_length, dense.config.max_position_embeddings
    if longest > context:
        raise UserError(f"data.sequence_length={longest} is more than the {context} positions that the model knows")


def _check_alike(recipe: Recipe, dense: DenseModel) -> None:
    """A model that is pruned already may have layers that no plan can make alike. Raises UserError."""
    shapes = {(site.kind, site.num_units) for site in dense.sites}
    if recipe.search.uniform and (len(shapes) != 2 or len(dense.sites) != 2 * dense.config.num_hidden_layers):
        raise UserError(
            f"model {recipe.model!r}: its layers differ in size already, so that search.uniform=true cannot make them "
            "alike; leave it out, or begin with the dense model"
        )


def _begin(recipe: Recipe, dense: DenseModel, out: Path, lock: RunLock) -> tuple[RunDirectory, Corpus]:
    """Open the run directory, and read or write the text. A new run is locked as soon as it has a folder."""
    corpus_file = out / "corpus.safetensors"
    corpus = None
    if recipe.data.source != "self" and not corpus_file.exists():
        # Read before the run directory exists, so that a mistake in the data leaves nothing behind.
        corpus = _read_text(recipe, dense)
    if dist.rank() == 0:
        lock.take()
    run = RunDirectory.open(out, recipe, {"model": dense.fingerprint, "darwinlm": darwinlm.__version__})
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
                    f"{corpus_file} was damaged, and data {recipe.data.source!r} gives other text than when this run "
                    "began; bring it back, or name a new folder"
                )
    return run, load_corpus(corpus_file)


def _recover(
    recipe: Recipe, here: Material, corpus: Corpus, plan: Plan, step: Step, folder: Path, run: RunDirectory
) -> int:
    """Refit and training of `plan`; what comes of it is `folder/weights.safetensors`. Returns how many blocks it read.

    Every step but the last has the same share of the tokens. The last has what is left, and each reads on in the text
    where the one before has stopped.
    """
    dense, database = here.dense, here.database
    earlier = run_steps(recipe, run.path)[: step.number - 1]
    passed = sum(run.facts(f"{one.prefix}recovery").get(_SAMPLES, 0) for one in earlier)
    left = max(0, recipe.recovery.tokens - passed * recipe.data.sequence_length)
    share = left if step.number == recipe.steps else recipe.recovery.tokens // recipe.steps
    wanted = recipe.recovery.model_copy(update={"tokens": share})
    # What is sharded need not fit on one device.
    place = torch.device("cpu") if wanted.sharding == "fsdp" else dense.device
    cuts = database.cuts(dense.sites, plan.levels, place)
    if wanted.refit_tokens > 0:
        refitted = folder / "refit"
        with dist.main_first():
            if dist.rank() == 0 and (fault := find_fault(refitted)) is not None:
                if refitted.exists():
                    log.warning("%s: it is refitted anew", fault)
                cuts_here = database.cuts(dense.sites, plan.levels, dense.device)
                model = build_model(dense.config, dense.sites, dense.weights, cuts_here, trainable=True)
                fitted_BT, judged_BT = corpus.tokens("trial", wanted.refit_tokens), corpus.blocks["score"]
                refit_if_it_helps(model, dense.reference.model, fitted_BT, judged_BT)
                save_weights(refitted, _stored(model, torch.float32))
        tensors = {name: tensor.to(place) for name, tensor in read_weights(refitted).items()}
        model = assemble(pruned_config(dense.config, dense.sites, cuts), tensors, trainable=True)
    else:
        weights = dense.checkpoint.read(dense.shapes, place, torch.float32)
        model = build_model(dense.config, dense.sites, weights, cuts, trainable=True)
    # The teacher has a dtype of its own, and memory is for the training now.
    dense.release()
    teacher = None
    if wanted.distillation > 0:
        fast = fast_dtype(dense.device)
        dtype = fast if wanted.teacher_dtype == "auto" else getattr(torch, wanted.teacher_dtype)
        teacher = dense.reference.whole(place, dtype)
    text: Tensor | TextStream = corpus.marked["trial"]
    if wanted.text == "stream":
        stopped = [file for one in earlier[-1:] if (file := one.folder / "recovery" / "text.json").exists()]
        begin = read_json(stopped[0]) if stopped else None
        text = TextStream(recipe.data, dense.tokenizer, recipe.seed, corpus.judged, begin)
    validation_BT = corpus.marked["score"]
    model, done = recover(
        model, teacher, text, validation_BT, wanted, seed=recipe.seed, folder=folder, device=dense.device, passed=passed
    )
    if dist.rank() == 0:
        history = {"loss": done.losses, "evaluations": done.evaluations, "taken": done.taken}
        write_json(folder / "losses.json", history)
        if step.number < recipe.steps and checkpoints(folder) and isinstance(text, TextStream):
            write_json(folder / "text.json", read_json(checkpoints(folder)[-1] / "text.json"))
        write_bytes(folder / "weights.safetensors", save(_stored(model, dense.dtype)))
        _forget_recovery(folder)
    dist.barrier()
    return steps_for(wanted, recipe.data.sequence_length) * wanted.batch_size


def _forget_recovery(folder: Path) -> None:
    """Remove what lets an interrupted recovery go on."""
    remove_checkpoints(folder)
    shutil.rmtree(folder / "refit", ignore_errors=True)


def _verify(run: RunDirectory, recipe: Recipe) -> None:
    """Read what is there of an earlier run once; what is damaged is named, and made again in its turn."""
    for step in run_steps(recipe, run.path):
        folder, stage = step.folder / "database", f"{step.prefix}database"
        index = folder / "index.json"
        if index.exists():
            try:
                read_json(index)
            except UserError:
                if not os.access(index, os.R_OK):
                    raise
                log.warning("%s is damaged: the database is built anew", index)
                index.unlink()
        elif run.done(stage):
            log.warning("%s is missing: the database is built anew", index)
        damaged = Database(folder).forget_damaged()
        for file in damaged:
            log.warning("%s is damaged or missing: its site is built anew", file)
        if damaged or not index.exists():
            run.undo(stage)
    for stage in list(run.manifest["stages"]):
        # Trained weights are verified when they are needed: where the model is whole they are not.
        if not stage.endswith("recovery"):
            run.verify(stage)


def _evaluate_and_export(
    recipe: Recipe,
    first: Material,
    here: Material,
    corpus: Corpus,
    budgets: tuple[Budget, Budget],
    plan: Plan,
    run: RunDirectory,
    size: Size,
) -> None:
    out, dense = size.folder, here.dense
    measured_file = out / "evaluation" / "measured.json"
    evaluated = run.done(f"{size.prefix}evaluation")
    if not (evaluated and run.done(f"{size.prefix}export")):
        models = {"dense": first.dense.model}
        # Where there is no room for all, the others wait elsewhere for their turns.
        wait = torch.device("cpu")
        if 4 * dense.compute_dtype.itemsize * here.space.parameters(plan.levels) < free_memory(dense.device):
            wait = dense.device
        uniform = uniform_plan(first.space, budgets[1])
        if uniform is not None:
            models["uniform"] = _cut(first, uniform).to(wait)  # type: ignore[arg-type]
        if here is not first:
            models[f"{STEP}{recipe.steps - 1}"] = dense.model
        models["found"] = _cut(here, plan).to(wait)  # type: ignore[arg-type]
        if recipe.recovery.wanted:
            models["recovered"] = _result(recipe, here, plan, size).to(wait)  # type: ignore[arg-type]
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
                parallel = recipe.export.tensor_parallel if target == "vllm" else 1
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
    models: Mapping[str, DarwinLMForCausalLM],
    size: Size,
) -> dict[str, Any]:
    """What `measured.json` holds; the last of `models` is the result."""
    rows = measure(models, corpus.blocks["held_out"], recipe.evaluation, dense.dtype)
    last = models[list(models)[-1]]
    sample = {"prompt": SAMPLE_PROMPT, "before": write_sample(dense.reference.model, dense.tokenizer)}
    with visiting(last, dense.device):
        sample["after"] = write_sample(last, dense.tokenizer)
    limits: list[dict[str, Any]] = [
        {"name": limit.name, "unit": limit.unit, "dense": limit.dense, "found": limit.cost(plan.levels)}
        for limit in budget.limits
    ]
    for limit in limits:
        if limit["name"] == "latency":
            timed = as_stored({name: models[name] for name in ("dense", "found")}, dense.dtype)
            seconds = request_seconds(timed, recipe.workload, recipe.evaluation.repeats)
            limit["measured"] = {name: round(1e9 * sum(parts)) for name, parts in seconds.items()}
    return {
        "model": recipe.model,
        "target": size.name,
        "rows": rows,
        "limits": limits,
        "sample": sample,
        "environment": environment(dense.device),
        "seed": recipe.seed,
    }


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read_text(recipe: Recipe, dense: DenseModel) -> Corpus:
    corpus = read_corpus(recipe.data, dense.tokenizer, recipe.seed)
    highest = max(int(blocks_BT.max()) for blocks_BT in corpus.blocks.values())
    if highest >= dense.config.vocab_size:
        raise UserError(
            f"model {recipe.model!r}: its tokenizer gives the id {highest}, but its embeddings hold "
            f"{dense.config.vocab_size} tokens; the tokenizer is another model's"
        )
    return corpus


def _own_text(dense: DenseModel, recipe: Recipe) -> Corpus:
    length = recipe.data.sequence_length
    # Each split ends with a whole document, and what of that does not fit is lost.
    tokens = sum(needed_blocks(recipe.data).values()) * length + len(SPLITS) * length
    return pack(write_documents(dense, tokens=tokens, longest=length, seed=recipe.seed), recipe.data)


def _cut(material: Material, plan: Plan) -> DarwinLMForCausalLM:
    dense = material.dense
    cuts = material.database.cuts(dense.sites, plan.levels, dense.device)
    return build_model(dense.config, dense.sites, dense.weights, cuts)


def _result(recipe: Recipe, here: Material, plan: Plan, size: Size) -> DarwinLMForCausalLM:
    """What a step leaves: `plan`, recovered if that is wanted."""
    cut = _cut(here, plan)
    if not recipe.recovery.wanted:
        return cut
    return copy_trained(cut, read_tensors(size.folder / "recovery" / "weights.safetensors"))


def _stored(model: DarwinLMForCausalLM, dtype: torch.dtype) -> dict[str, Tensor]:
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, for every number that is reported."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {
        "device": name,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "darwinlm": darwinlm.__version__,
    }
