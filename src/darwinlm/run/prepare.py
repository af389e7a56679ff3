"""The first stages of a run: its directory, its text and its databases."""

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from darwinlm._version import __version__
from darwinlm.config.recipe import Recipe
from darwinlm.config.stage import Stage
from darwinlm.data.corpus import SPLITS, Corpus, load_corpus, needed_blocks, pack, read_corpus, save_corpus
from darwinlm.data.self_text import write_documents
from darwinlm.data.tokens import Tokens
from darwinlm.database.build import build_database
from darwinlm.database.levels import check_tensor_parallel
from darwinlm.database.prunable import Prunable
from darwinlm.database.store import Database
from darwinlm.errors import UserError
from darwinlm.models.families import is_hybrid
from darwinlm.models.loading import DenseModel, load_dense
from darwinlm.models.sites import sites_needed
from darwinlm.models.smollm2 import resolve
from darwinlm.plan import check_target
from darwinlm.run.directory import VERSION, RunDirectory, Step, run_steps
from darwinlm.run.lock import RunLock
from darwinlm.runtime import dist
from darwinlm.runtime.files import file_checksum, read_json
from darwinlm.runtime.memory import check_room
from darwinlm.runtime.progress import Phases, log


def load_original(recipe: Recipe, device: torch.device) -> DenseModel:
    """Load the model of `recipe`, and check that the recipe suits it. Raises UserError."""
    units, model = recipe.database, repr(recipe.model)
    dense = load_dense(resolve(recipe.model), units.granularity, device, expert_unit=units.experts)
    if units.experts == "channels" and not any(site.routed for site in dense.sites):
        raise UserError(f"database.experts=channels: model {model} has no experts; remove the setting")
    longest, context = recipe.data.sequence_length, dense.config.max_position_embeddings
    if longest > context:
        raise UserError(f"data.sequence_length={longest} exceeds the model's maximum of {context} positions; lower it")
    if recipe.recovery.cut_documents and is_hybrid(dense.config):
        raise UserError(
            f"recovery.cut_documents: {model} has linear attention, whose state carries over from one document to the "
            "next; set it to false"
        )
    check_tensor_parallel(dense.sites, recipe.export.tensor_parallel)
    for size in recipe.sizes:
        if "params" in size.limits:
            check_target("params", size.limits["params"], dense=dense.parameters, smallest=dense.fixed_parameters)
    return dense


def load_result(recipe: Recipe, folder: Path, original: DenseModel) -> DenseModel:
    """Load the result of a step, the input of the next one. Raises UserError."""
    units = recipe.database
    dense = load_dense(str(folder), units.granularity, original.device, original, expert_unit=units.experts)
    return replace(dense, offload=original.offload)


def check_memory(recipe: Recipe, dense: DenseModel) -> None:
    """Raise UserError if the model does not fit."""
    dtype = dense.compute_dtype
    # Streamed layers are read from their files as needed, and a candidate needs less than the whole model.
    what = f"model {recipe.model!r} in {str(dtype).split('.')[1]}"
    check_room(dtype.itemsize * dense.parameters, dense.layers_device, what)


def open_run(recipe: Recipe, dense: DenseModel, out: Path, lock: RunLock) -> tuple[RunDirectory, Corpus]:
    """Open the run directory, and read or write its text. A new run is locked as soon as its folder exists."""
    corpus_file, stage = out / "corpus.safetensors", Stage("corpus")
    corpus = None
    if recipe.data.source != "self" and not corpus_file.exists():
        # Read before the run directory exists, so that invalid data leaves nothing behind.
        corpus = _read_text(recipe, dense)
    if dist.rank() == 0:
        lock.take()
    run = RunDirectory.open(out, recipe, {"model": dense.fingerprint, VERSION: __version__})
    if dist.rank() == 0:
        _verify(run, recipe)
    if not run.done(stage):
        before = run.outputs(stage)
        with run.stage(stage, corpus_file):
            if corpus is None:
                corpus = generate_text(dense, recipe) if recipe.data.source == "self" else _read_text(recipe, dense)
            save_corpus(corpus, corpus_file)
            if before and file_checksum(corpus_file) != before[corpus_file.name]:
                save_corpus(corpus, corpus_file, former=True)  # Version 0.1 or 0.2 may have written it.
            if before and file_checksum(corpus_file) != before[corpus_file.name]:
                corpus_file.unlink()
                raise UserError(
                    f"{corpus_file} was damaged, and data {recipe.data.source!r} no longer yields the same "
                    "text; restore it, or start a new run in a new folder"
                )
    return run, load_corpus(corpus_file)


def prepare_database(
    recipe: Recipe, dense: DenseModel, corpus: Corpus, step: Step, run: RunDirectory, kept: Collection[str]
) -> Prunable:
    """Build the database of a step, or open it; the sites in `kept` are never removed as a whole."""
    folder, stage = step.folder / "database", step.stage("database")
    if not run.done(stage):
        phases = Phases(lambda: _synchronise(dense.device))
        with run.stage(stage) as facts:
            tokens_BT, parallel = corpus.splits["calibration"].input_ids_BT, recipe.export.tensor_parallel
            build_database(dense, tokens_BT, recipe.database, folder, phases, parallel)
            facts["seconds_by_phase"] = {name: round(seconds, 3) for name, seconds in phases.seconds.items()}
    return Prunable(dense, Database(folder, kept=frozenset(kept) | sites_needed(dense.config, dense.sites)))


def generate_text(dense: DenseModel, recipe: Recipe) -> Corpus:
    """Let the model write the text of all splits (`data.source=self`)."""
    length = recipe.data.sequence_length
    # Each split ends with a whole document; the part that does not fit is discarded.
    tokens = sum(needed_blocks(recipe.data).values()) * length + len(SPLITS) * length
    documents = write_documents(dense, tokens=tokens, longest=length, seed=recipe.seed)
    return pack(map(Tokens.document, documents), recipe.data)


def _read_text(recipe: Recipe, dense: DenseModel) -> Corpus:
    corpus = read_corpus(recipe.data, dense.tokenizer, recipe.seed)
    highest = max(int(tokens.input_ids_BT.max()) for tokens in corpus.splits.values())
    if highest >= dense.config.vocab_size:
        raise UserError(
            f"model {recipe.model!r}: its tokenizer produces the id {highest}, but it has only "
            f"{dense.config.vocab_size} embeddings; the tokenizer belongs to another model"
        )
    return corpus


def _verify(run: RunDirectory, recipe: Recipe) -> None:
    """Verify the files of an earlier run once; damaged ones are reported and recreated by their stage."""
    for step in run_steps(recipe, run.path):
        folder, stage = step.folder / "database", step.stage("database")
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
    for stage in run.stages:
        # Trained weights are verified when they are needed; with an intact model they are not.
        if stage.kind != "recovery":
            run.verify(stage)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
