"""Corpus files of versions 0.1 and 0.2, where a token's columns are packed into one int32.

`id + 2**30` (bit 30) marks the first token of a piece of text. The bitwise complement, which is negative, marks a token
that is no target of training.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from darwinlm.data.tokens import Tokens

_BEGINS = 2**30
_SPLITS = {"held_out": "test", "score": "validation", "calibration": "calibration", "trial": "train"}
"""Names of the splits, then and now."""
_OTHERS = {"judged": "evaluation.fingerprints"}
"""Names of other tensors, then and now."""


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
    found = {_OTHERS[name]: tensor for name, tensor in tensors.items() if name in _OTHERS}
    for name, split in _SPLITS.items():
        if name in tensors:
            found |= unpack(tensors[name]).columns(f"{split}.")
    return found


def to_packed(splits: Mapping[str, Tokens], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a former file."""
    return {former: pack(splits[split]) for former, split in _SPLITS.items()} | {
        former: others[name] for former, name in _OTHERS.items() if name in others
    }
