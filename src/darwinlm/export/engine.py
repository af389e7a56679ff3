"""Engines that pruned models are exported to: what each of them supports, and how its exports are written and run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from darwinlm.export.gguf_tokenizer import load_tokenizer
from darwinlm.models.config import load_config
from darwinlm.models.loading import DenseModel
from darwinlm.models.modeling_darwinlm import PrunedConfig, PrunedModel
from darwinlm.models.pruned import load

STORED_AS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class Export:
    """A pruned model that is exported, and the options of this export."""

    source: Path
    """Folder of the pruned model."""
    requested_dtype: str | None
    devices: int
    """Tensor-parallel size."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user, collected on the way: what was not verified, what the engine does not support."""

    @cached_property
    def config(self) -> PrunedConfig:
        """The config of the pruned model."""
        config: PrunedConfig = load_config(str(self.source))
        return config

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the pruned model."""
        return load_tokenizer(self.source)

    @cached_property
    def model(self) -> PrunedModel:
        """The model in its stored dtype."""
        return load(self.source)

    def load_exact(self) -> PrunedModel:
        """Load the model in float32 and drop `model`. Casting that one would keep what its dtype has rounded, such as
        the factor of Gemma's embeddings."""
        self.__dict__.pop("model", None)
        return load(self.source, dtype=torch.float32)

    @cached_property
    def dtype(self) -> str:
        """Type of the exported weight matrices: the requested one, or that of the model."""
        return self.requested_dtype or STORED_AS[self.model.dtype]


def _nothing(_: Any) -> None:
    """Accept everything."""


def _all_positions(config: PrunedConfig) -> int:
    positions: int = config.max_position_embeddings
    return positions


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine, or a format that several engines read. Functions raise UserError."""

    name: str
    """Name for `--to`, and for `export.targets` of a recipe."""
    suffix: str
    """Default path, appended to that of the model; it may contain `{export.dtype}`. If empty, the model is replaced."""
    write: Callable[[Export, Path], Mapping[str, Any]]
    """Writes an export to a draft folder, or to a draft file, and returns what to record about it."""
    logits: Callable[[Export, Path, Sequence[int]], np.ndarray]
    """Runs a draft, and returns the logits by position and vocabulary entry."""
    packages: tuple[str, ...] = ("transformers",)
    """What `pip install` needs in order to run a draft; the first one is named as the engine."""
    check: Callable[[Export | DenseModel], object] = _nothing
    """Rejects a model that the engine cannot run, dense or pruned, and missing packages."""
    check_export: Callable[[Export], object] = _nothing
    """Rejects the sizes of a pruned model, or the options of an export."""
    positions: Callable[[PrunedConfig], int] = _all_positions
    """Returns the longest text that an export supports."""
    magic: bytes = b""
    """First bytes of an export that is a single file; empty if it is a folder."""
    dtypes: Mapping[str, float] = field(default_factory=dict)
    """Choices of `--dtype`, with the largest difference of logits that rounding to them may cause."""
    tensor_parallel: bool = False
    """Whether `--tensor-parallel` applies."""
    kept_sites: frozenset[str] = frozenset()
    """Sites that no plan may remove completely, so that an export needs no stubs."""
