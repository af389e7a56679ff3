"""Corpus files of versions 0.1 and 0.2, where a token's columns are packed into one int32.

`id + 2**30` (bit 30) marks the first token of a piece of text. The bitwise complement, which is negative, marks a token
that is no target of training.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from darwinlm.data.tokens import Tokens

_BEGINS = 2**30
_RENAMED = {"judged": "evaluation.fingerprints"}
"""Names of tensors that are not splits, then and now."""


def unpack(packed_BT: Tensor) -> Tokens:
    """Return the columns of packed tokens, int32."""
    loss_mask_BT = packed_BT >= 0
    ids_BT = torch.where(loss_mask_BT, packed_BT, ~packed_BT)
    return Tokens(ids_BT & (_BEGINS - 1), loss_mask_BT, (ids_BT & _BEGINS) != 0)


def pack(tokens: Tokens) -> Tensor:
    """Return packed tokens, int32."""
    ids_BT = tokens.input_ids_BT | (_BEGINS * tokens.document_starts_BT.int())
    return torch.where(tokens.loss_mask_BT, ids_BT, ~ids_BT)


def to_columns(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of today's file for those of a former one."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _RENAMED:
            found[_RENAMED[name]] = tensor
        else:
            found |= unpack(tensor).columns(f"{name}.")
    return found


def to_packed(splits: Mapping[str, Tokens], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a former file."""
    named = {now: before for before, now in _RENAMED.items()}
    return {split: pack(tokens) for split, tokens in splits.items()} | {
        named[name]: tensor for name, tensor in others.items()
    }
