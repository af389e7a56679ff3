"""The whole flow on one page: corpus, database, search, recovery, evaluation, export, report."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

import darwinlm
from darwinlm import dist
from darwinlm.adapters.cutting import build_model, copy_trained
from darwinlm.adapters.loading import DenseModel, choose_device, load_dense
from darwinlm.adapters.modeling_darwinlm import DarwinLMForCausalLM
from darwinlm.data import SPLITS, Corpus, load_corpus, needed_blocks, pack, read_corpus, save_corpus
from darwinlm.database.build import build_database
from darwinlm.database.store import Database
from darwinlm.demo import resolve
from darwinlm.errors import UserError
from darwinlm.evaluation.measure import SAMPLE_PROMPT, as_stored, measure, request_seconds, write_sample
from darwinlm.export.card import model_card
from darwinlm.export.hf import export_hf, load
from darwinlm.files import RunDirectory, file_checksum, read_json, read_tensors, write_bytes, write_json
from darwinlm.lock import RunLock
from darwinlm.memory import check_room, naming_memory_faults
from darwinlm.plan import Budget, Plan, check_target, make_budget
from darwinlm.progress import Phases, log
from darwinlm.recipe import Recipe, load_recipe, parse_target, split_targets
from darwinlm.recovery.refit import refit
from darwinlm.recovery.stage import recover, remove_checkpoints
from darwinlm.search.allocation import uniform_plan
from darwinlm.search.resources import resource_limits
from darwinlm.search.stage import search_plan
from darwinlm.self_text import write_documents


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


def run_recipe(recipe: Recipe, out: Path) -> Run:
    """Run every stage of `recipe` that is not done yet in the run directory `out`. Raises UserError.

    Under torchrun all ranks build the database and search together; the other stages are rank 0's, and the others wait.
    """
    dist.start()
    device = dist.local_device(choose_device(recipe.device))
    RunDirectory.check(out, recipe)
    with RunLock(out) as lock:
        if dist.rank() == 0 and (out / "manifest.json").exists():
            lock.take()
        dist.barrier()
        with naming_memory_faults("loading the model"):
            return _run_stages(recipe, device, out, lock)


def _run_stages(recipe: Recipe, device: torch.device, out: Path, lock: RunLock) -> Run:
    torch.manual_seed(recipe.seed)
    dense = load_dense(resolve(recipe.model), recipe.database.granularity, device)
    _check_length(recipe, dense)
    sizes = _sizes(recipe, out)
    for size in sizes:
        if "params" in size.target:
            check_target("params", size.target["params"], dense=dense.parameters, smallest=dense.fixed_parameters)
    if not (out / "report" / "metrics.json").exists():
        check_room(4 * dense.parameters, device, f"model {recipe.model!r} in float32")
    with dist.main_first():
        run, corpus = _begin(recipe, dense, out, lock)

    if not run.done("database"):
        phases = Phases(lambda: _synchronise(device))
        with run.stage("database") as facts:
            build_database(dense, corpus.blocks["calibration"], recipe.database, out / "database", phases)
            facts["seconds_by_phase"] = {name: round(seconds, 3) for name, seconds in phases.seconds.items()}
    database = Database(out / "database")
    space = database.space(dense.sites)
    larger: Path | None = None
    for size in sizes:
        limits = resource_limits(dense, space, size.target, recipe.workload, out / "search" / "latency.json")
        budget = make_budget(size.target, limits)
        search_folder = size.folder / "search"
        if not run.done(f"{size.prefix}search"):
            found = search_folder / "best_plan.json", search_folder / "history.jsonl"
            with run.stage(f"{size.prefix}search", *found):
                search_plan(dense, database, corpus, budget, recipe.search, recipe.seed, search_folder, larger)
        larger = search_folder if recipe.search.descent_rounds > 0 else None
        with dist.main_first():
            if dist.rank() == 0:
                _recovery_to_export(recipe, dense, corpus, database, budget, run, size)
    if len(sizes) > 1 and dist.rank() == 0:
        write_json(out / "report" / "metrics.json", _family_metrics(sizes, run), sealed=True)
    dist.barrier()
    return Run(out, read_json(out / "report" / "metrics.json"))


@dataclass(frozen=True)
class _Size:
    """One of the sizes that a run is to give."""

    name: str
    target: Mapping[str, float | int]
    folder: Path
    prefix: str
    """Of the names of its stages."""


def _sizes(recipe: Recipe, out: Path) -> list[_Size]:
    """The sizes of a family, the largest first, each in a folder of its own; or the one that is asked for."""
    targets = split_targets(recipe.target)
    if len(targets) == 1:
        return [_Size(str(targets[0]), parse_target(targets[0]), out, "")]
    names = [str(target) for target in targets]
    sizes = [_Size(name, parse_target(name), out / "sizes" / name, f"{name}: ") for name in names]
    return sorted(sizes, key=lambda size: -size.target["params"])


def _family_metrics(sizes: list[_Size], run: RunDirectory) -> dict[str, Any]:
    """Of all sizes: the dense model's row, and the last of each."""
    each = [read_json(size.folder / "report" / "metrics.json") for size in sizes]
    rows = [metrics["rows"][-1] | {"name": size.name} for size, metrics in zip(sizes, each, strict=True)]
    whole = each[-1] | {"target": ", ".join(size.name for size in sizes), "rows": [each[0]["rows"][0], *rows]}
    del whole["limits"]
    return whole | {"stages": run.manifest["stages"]}


def _check_length(recipe: Recipe, dense: DenseModel) -> None:
    longest, context = recipe.data.sequence_length, dense.config.max_position_embeddings
    if longest > context:
        raise UserError(f"data.sequence_length={longest} is more than the {context} positions that the model knows")


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
        _verify(run)
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


def _verify(run: RunDirectory) -> None:
    """Read what is there of an earlier run once; what is damaged is named, and made again in its turn."""
    folder = run.path / "database"
    index = folder / "index.json"
    if index.exists():
        try:
            read_json(index)
        except UserError:
            if not os.access(index, os.R_OK):
                raise
            log.warning("%s is damaged: the database is built anew", index)
            index.unlink()
    elif run.done("database"):
        log.warning("%s is missing: the database is built anew", index)
    damaged = Database(folder).forget_damaged()
    for file in damaged:
        log.warning("%s is damaged or missing: its site is built anew", file)
    if damaged or not index.exists():
        run.undo("database")
    for stage in list(run.manifest["stages"]):
        # Trained weights are verified when they are needed: where the model is whole they are not.
        if not stage.endswith("recovery"):
            run.verify(stage)


def _recovery_to_export(
    recipe: Recipe,
    dense: DenseModel,
    corpus: Corpus,
    database: Database,
    budget: Budget,
    run: RunDirectory,
    size: _Size,
) -> None:
    out = size.folder
    space = database.space(dense.sites)
    plan = Plan.from_dict(read_json(out / "search" / "best_plan.json"), space)

    metrics_file, weights_file = out / "report" / "metrics.json", out / "recovery" / "weights.safetensors"
    metrics = _measured(metrics_file) if run.done(f"{size.prefix}evaluation") else None
    if metrics is not None and run.done(f"{size.prefix}export"):
        return

    run.verify(f"{size.prefix}recovery")
    if recipe.recovery.wanted and not run.done(f"{size.prefix}recovery"):
        with run.stage(f"{size.prefix}recovery", weights_file):
            model = _cut(dense, database, plan, trainable=True)
            text_BT, folder = corpus.blocks["trial"], out / "recovery"
            if recipe.recovery.refit_tokens > 0:
                refit(model, dense.model, corpus.tokens("trial", recipe.recovery.refit_tokens))
            losses = recover(model, dense.model, text_BT, recipe.recovery, seed=recipe.seed, folder=folder)
            write_json(out / "recovery" / "losses.json", {"loss": losses})
            write_bytes(weights_file, save(_stored(model, dense.dtype)))
            remove_checkpoints(folder)

    models = _models(dense, database, budget, plan)
    if recipe.recovery.wanted:
        models["recovered"] = copy_trained(models["found"], read_tensors(weights_file))
    last = models[next(reversed(models))]
    if metrics is None:
        metrics_file.unlink(missing_ok=True)  # of other weights, should the run stop between measuring and writing
        with run.stage(f"{size.prefix}evaluation"):
            rows = measure(models, corpus.blocks["held_out"], recipe.evaluation, dense.dtype)
            sample = {
                "prompt": SAMPLE_PROMPT,
                "before": write_sample(dense.model, dense.tokenizer),
                "after": write_sample(last, dense.tokenizer),
            }
        limits: list[dict[str, Any]] = [
            {"name": limit.name, "unit": limit.unit, "dense": limit.dense, "found": limit.cost(plan.levels)}
            for limit in budget.limits
        ]
        for limit in limits:
            if limit["name"] == "latency":
                timed = as_stored({name: models[name] for name in ("dense", "found")}, dense.dtype)
                seconds = request_seconds(timed, recipe.workload, recipe.evaluation.repeats)
                limit["measured"] = {name: round(1e9 * sum(parts)) for name, parts in seconds.items()}
        metrics = {
            "model": recipe.model,
            "target": size.name,
            "rows": rows,
            "limits": limits,
            "sample": sample,
            "environment": environment(dense.device),
            "seed": recipe.seed,
        }
    with run.stage(f"{size.prefix}export", out / "model"):
        as_json = plan.to_dict(space)
        export_hf(last, dense, as_json, model_card(recipe, as_json, metrics), out / "model")
    write_json(metrics_file, metrics | {"stages": run.manifest["stages"]}, sealed=True)
    log.info("done: %s", out / "model")


def _measured(metrics_file: Path) -> dict[str, Any] | None:
    """What was measured before; None where it has to be measured again."""
    if not metrics_file.exists():
        return None
    try:
        return read_json(metrics_file)
    except UserError:
        log.warning("%s is damaged: it is measured again", metrics_file)
        return None


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


def _cut(dense: DenseModel, database: Database, plan: Plan, *, trainable: bool) -> DarwinLMForCausalLM:
    cuts = database.cuts(dense.sites, plan.levels, dense.device)
    return build_model(dense.config, dense.sites, dense.weights, cuts, trainable=trainable)


def _models(dense: DenseModel, database: Database, budget: Budget, plan: Plan) -> dict[str, DarwinLMForCausalLM]:
    models = {"dense": dense.model}
    uniform = uniform_plan(database.space(dense.sites), budget)
    if uniform is not None:
        models["uniform"] = _cut(dense, database, uniform, trainable=False)
    return models | {"found": _cut(dense, database, plan, trainable=False)}


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
