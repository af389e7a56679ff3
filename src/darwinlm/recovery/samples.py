"""The training text of a recovery in order: the same for any number of ranks, and after resuming."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darwinlm.config.recipe import RecoveryRecipe
from darwinlm.data.corpus import TextStream
from darwinlm.data.tokens import Tokens
from darwinlm.recovery.checkpoints import step_of
from darwinlm.recovery.teacher import CachedTeacher, Predictions
from darwinlm.runtime.files import read_json


class Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """All training samples in order: blocks, reshuffled in each pass.

    The order is the same for any number of ranks, and after resuming.
    """

    def __init__(
        self, text: Tokens, samples: int, seed: int, passed: int, cut: bool, cached: Predictions | None = None
    ) -> None:
        self._text, self._cut, self._cached = text, cut, cached
        generator = torch.Generator().manual_seed(seed)
        passes = -(-(passed + samples) // len(text))
        order = torch.cat([torch.randperm(len(text), generator=generator) for _ in range(passes)])
        self._order = order[passed : passed + samples]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = int(self._order[index])
        return sample(self._text[block], self._cut) | (self._cached[block] if self._cached is not None else {})


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Samples from a stream. Rank 0 reads and distributes them, some batches in advance."""

    def __init__(
        self, stream: TextStream, batch_size: int, steps_done: int, state: Mapping[str, Any] | None, cut: bool
    ) -> None:
        self._stream, self._batch_size, self._cut = stream, batch_size, cut
        self._steps_done, self._state = steps_done, state
        self._states: dict[int, Mapping[str, Any]] = {}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        samples = self._steps_done * self._batch_size
        for block, state in self._stream.blocks(self._state):
            samples += 1
            if samples % self._batch_size == 0:
                self._states[samples // self._batch_size] = state
            yield sample(block, self._cut)

    def state_after(self, step: int) -> dict[str, Any]:
        """Return the position of the stream after the batch of this optimizer step, as plain data; earlier steps are
        dropped."""
        self._states = {number: state for number, state in self._states.items() if number >= step}
        return {**self._states[step], "tokens": self._states[step]["tokens"].to_json()}


def sample(text: Tokens, cut: bool) -> dict[str, Tensor]:
    """Return the inputs of the objective; with `cut`, position ids restart at every document."""
    ids_BT, labels_BT = text.input_ids_BT.long(), text.labels
    if not cut:
        return {"input_ids": ids_BT, "labels": labels_BT}
    positions_BT = text.position_ids
    # The first token of a document cannot be predicted.
    return {"input_ids": ids_BT, "labels": labels_BT.masked_fill(positions_BT == 0, -100), "position_ids": positions_BT}


def make_samples(
    text: Tokens | TextStream,
    steps: int,
    recipe: RecoveryRecipe,
    seed: int,
    last: Path | None,
    passed: int,
    cached: CachedTeacher | None,
) -> Blocks | Stream:
    """Create the training samples, continuing from the checkpoint `last` if there is one; other arguments as in
    `recover`."""
    size, cut = recipe.batch_size, recipe.cut_documents
    if isinstance(text, Tokens):
        return Blocks(text, steps * size, seed, passed, cut, cached.text if cached is not None else None)
    if last is None:
        return Stream(text, size, 0, None, cut)
    return Stream(text, size, step_of(last), read_json(last / "text.json"), cut)
