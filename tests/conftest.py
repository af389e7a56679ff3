"""Fixtures: tiny checkpoints of every family, databases pruned from them, and a finished run."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# Tensors are tiny: a second thread only waits, on a busy machine for long.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import transformers
from helpers import SETTINGS, TARGET, VOCABULARY, make_checkpoint

from darwinlm.config.recipe import DatabaseRecipe
from darwinlm.database.build import build_database
from darwinlm.database.store import Database
from darwinlm.models.loading import DenseModel, load_dense
from darwinlm.pipeline import prune
from darwinlm.recovery import training
from darwinlm.run.finished import Run
from darwinlm.search import trial_training


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a family's checkpoint."""
    folders: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in folders:
            folders[family] = make_checkpoint(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return get


@pytest.fixture(scope="session")
def calibration() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def pruned(
    checkpoint: Callable[[str], Path], calibration: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[DenseModel, Database]]:
    """Return a function that gives the dense model of a family and its database, with at most 4 levels per site."""
    known: dict[tuple[str, str], tuple[DenseModel, Database]] = {}

    def get(family: str, granularity: str) -> tuple[DenseModel, Database]:
        key = (family, granularity)
        if key not in known:
            dense = load_dense(str(checkpoint(family)), granularity, torch.device("cpu"))
            folder = tmp_path_factory.mktemp("database")
            known[key] = dense, build_database(dense, calibration, DatabaseRecipe(levels=4, batch_size=3), folder)
        return known[key]

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random sentences of a few words, with enough structure for second-order pruning."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(50)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(rng.choices(words, k=2_000)))
    return file


@pytest.fixture(scope="session")
def run(
    checkpoint: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, dict[str, Any]]:
    """Finished run and its settings."""
    out = tmp_path_factory.mktemp("run") / "whole"
    settings = {**SETTINGS, "data.source": str(text)}
    return prune(checkpoint("qwen3"), target=TARGET, out=out, settings=settings), settings


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Return a function that limits memory to passes of one block, and returns the sizes of all passes."""
    for module in (trial_training, training):
        monkeypatch.setattr(module, "fast_dtype", lambda device: torch.float32)

    def begin() -> list[int]:
        seen: list[int] = []

        for name in ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"):
            kind = getattr(transformers, name)

            def small(model: Any, input_ids: torch.Tensor, forward: Any = kind.forward, **arguments: Any) -> Any:
                seen.append(len(input_ids))
                # The first half of the first batch in two parts succeeds: its gradients must be discarded.
                if len(input_ids) > 2 or seen[-2:] == [2, 2]:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                return forward(model, input_ids, **arguments)

            monkeypatch.setattr(kind, "forward", small)
        return seen

    return begin
