"""The models to evaluate: those of a run, or a single model; each is loaded on demand."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from darwinlm.config.recipe import Recipe
from darwinlm.errors import UserError
from darwinlm.models.config import is_pruned, load_settings
from darwinlm.models.loading import choose_device, load_dense
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.models.pruned import load
from darwinlm.models.smollm2 import resolve
from darwinlm.run.directory import read_manifest, run_sizes

Loader = Callable[[], tuple[PrunedModel, Any]]
"""Loads a model, in its stored dtype, and its tokenizer."""


def models_of_run(run: Path) -> dict[str, Loader]:
    """Return loaders of the dense model and of every size, by name. Raises UserError if a model does not exist yet."""
    recipe, manifest = read_manifest(run)
    sizes = run_sizes(recipe, run)
    for size in sizes:
        if not (size.folder / "model" / "config.json").is_file():
            raise UserError(f"{run}: no model in {size.folder / 'model'} yet; finish the run first")
    device = choose_device(recipe.device)
    loaders: dict[str, Loader] = {"dense": partial(_dense, run, recipe, manifest["facts"].get("model"), device)}
    for size in sizes:
        name = size.name if len(sizes) > 1 else "pruned"
        loaders[name] = partial(_pruned, size.folder / "model", device)
    return loaders


def _dense(run: Path, recipe: Recipe, fingerprint: str | None, device: torch.device) -> tuple[PrunedModel, Any]:
    dense = load_dense(resolve(recipe.model), recipe.database.granularity, device, expert_unit=recipe.database.experts)
    if dense.fingerprint != fingerprint:
        raise UserError(f"{run}: the checkpoint of {recipe.model!r} has changed since this run started; restore it")
    return dense.model.to(dense.dtype), dense.tokenizer


def one_model(source: str) -> tuple[PrunedModel, Any]:
    """Load the dense or pruned model of a folder or Hub id, and its tokenizer. Raises UserError."""
    device = choose_device("auto")
    folder = resolve(source)
    if is_pruned(load_settings(folder)):
        return _pruned(Path(folder), device)
    dense = load_dense(folder, "kv_group", device)
    return dense.model.to(dense.dtype), dense.tokenizer


def _pruned(folder: Path, device: torch.device) -> tuple[PrunedModel, Any]:
    model = load(folder, device=str(device))
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
