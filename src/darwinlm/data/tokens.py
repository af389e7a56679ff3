"""Tokens as columns: ids, the tokens that count in a loss, and where documents begin.

Dimension letters: B blocks, T tokens of a block. A single block or a document has no B.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_DTYPES = {"input_ids": torch.int32, "loss_mask": torch.bool, "document_starts": torch.bool}
"""Columns in files."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Columns of the same shape: blocks of text, a single block, or a document."""

    input_ids_BT: Tensor
    """Token ids, int32."""
    loss_mask_BT: Tensor
    """Whether each token is a target of training, bool."""
    document_starts_BT: Tensor
    """Whether a document, or a piece of a long one, begins at each token, bool."""

    @classmethod
    def unmasked(cls, input_ids_BT: Tensor) -> "Tokens":
        """Create tokens that are all targets of training, each block being one document."""
        starts_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
        starts_BT[..., :1] = True
        return cls(input_ids_BT, torch.ones_like(starts_BT), starts_BT)

    @classmethod
    def document(cls, ids: Sequence[int], loss_mask: Sequence[bool] | None = None) -> "Tokens":
        """Create a document; without `loss_mask`, all its tokens are targets of training."""
        whole = cls.unmasked(torch.tensor(ids, dtype=_DTYPES["input_ids"]))
        if loss_mask is None:
            return whole
        return cls(whole.input_ids_BT, torch.tensor(loss_mask, dtype=torch.bool), whole.document_starts_BT)

    @classmethod
    def cat(cls, parts: Sequence["Tokens"]) -> "Tokens":
        """Concatenate `parts` along their first dimension."""
        return cls(*(torch.cat(columns) for columns in zip(*(part._tensors() for part in parts), strict=True)))

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any], prefix: str = "") -> "Tokens":
        """Create tokens from the tensors or lists in `columns` that are named as by `columns`."""
        return cls(*(torch.as_tensor(columns[f"{prefix}{name}"], dtype=dtype) for name, dtype in _DTYPES.items()))

    def columns(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the tensors by column name, after `prefix`."""
        return {f"{prefix}{name}": column for name, column in zip(_DTYPES, self._tensors(), strict=True)}

    def to_json(self) -> dict[str, list[Any]]:
        """Return lists by column name, with 1 for true, for `from_columns`."""
        return {name: column.int().tolist() for name, column in self.columns().items()}

    @property
    def labels(self) -> Tensor:
        """Labels for training, int64: the token ids, or -100 for tokens that are no targets."""
        return self.input_ids_BT.long().masked_fill(~self.loss_mask_BT, -100)

    @property
    def position_ids(self) -> Tensor:
        """Position of each token, int64, counted from the start of its document or of the block, whichever is later.

        Pieces of a long document count as documents, because they are not adjacent.
        """
        index_BT = torch.arange(self.input_ids_BT.shape[-1], device=self.input_ids_BT.device)
        index_BT = index_BT.expand_as(self.input_ids_BT)
        return index_BT - (index_BT * self.document_starts_BT).cummax(-1).values

    def __len__(self) -> int:
        return len(self.input_ids_BT)

    def __getitem__(self, index: int | slice | Tensor) -> "Tokens":
        return self._changed(lambda column: column[index])

    def split(self, size: int) -> Iterator["Tokens"]:
        """Yield parts of `size` blocks; the last may have fewer."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def first(self, count: int) -> "Tokens":
        """Return the first blocks that hold `count` tokens; a single block is cut to `count` tokens (at least 2)."""
        length = self.input_ids_BT.shape[1]
        if count >= length:
            return self[: -(-count // length)]
        return self._changed(lambda column: column[:1, : max(2, count)])

    def view(self, *shape: int) -> "Tokens":
        """Return the columns in another shape."""
        return self._changed(lambda column: column.view(*shape))

    def to(self, device: torch.device) -> "Tokens":
        """Return the columns on `device`."""
        return self._changed(lambda column: column.to(device))

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.input_ids_BT, self.loss_mask_BT, self.document_starts_BT

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        return Tokens(*map(change, self._tensors()))
