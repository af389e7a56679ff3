"""KL divergence from the dense model and perplexity, in float32, without ever holding tokens * vocabulary of a set.

Dimension letters: B blocks, T tokens of a block, N tokens of a chunk, D hidden size, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from darwinlm.adapters.modeling_darwinlm import DarwinLMForCausalLM

_CHUNK_TOKENS = 256
_BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How a model does on some text."""

    kl: float
    """KL(dense || model) in nats, mean over all positions."""
    perplexity: float
    """exp of the mean next-token loss over all positions but each block's last."""


class DenseReference:
    """The dense model's last hidden states on some blocks: run once, compared with any number of models."""

    @torch.no_grad()
    def __init__(self, dense: DarwinLMForCausalLM, blocks_BT: Tensor) -> None:
        self._blocks_BT = blocks_BT.to(dense.device, torch.long)
        self._head_VD = dense.lm_head.weight
        self._batch = max(1, _BATCH_TOKENS // blocks_BT.shape[1])
        self._hidden_BTD = torch.cat([_hidden(dense, batch) for batch in self._blocks_BT.split(self._batch)])

    def batches(self, count: int | None = None) -> tuple[Tensor, ...]:
        """The token ids of the first `count` blocks (all by default), in the batches that comparisons go by."""
        batches: tuple[Tensor, ...] = self._blocks_BT[:count].split(self._batch)
        return batches

    @torch.no_grad()
    def compare(self, model: DarwinLMForCausalLM, tokens: int | None = None) -> Fidelity:
        """KL and perplexity of `model` on the first `tokens` tokens (all of them by default), in whole blocks."""
        length = self._blocks_BT.shape[1]
        count = len(self._blocks_BT) if tokens is None else min(len(self._blocks_BT), -(-tokens // length))
        hidden = (_hidden(model, ids_BT) for ids_BT in self.batches(count))
        return self.compare_hidden(hidden, model.lm_head.weight, count)

    @torch.no_grad()
    def compare_hidden(self, hidden: Iterable[Tensor], head_VD: Tensor, count: int | None = None) -> Fidelity:
        """The same from a model's last hidden states on the first `count` blocks, in batches of `batches(count)`."""
        length = self._blocks_BT.shape[1]
        count = len(self._blocks_BT) if count is None else count
        kl = loss = 0.0
        for hidden_BTD, ids_BT, dense_BTD in zip(
            hidden,
            self.batches(count),
            self._hidden_BTD[:count].split(self._batch),
            strict=True,
        ):
            hidden_ND = hidden_BTD.flatten(0, 1)
            # A block's last position has no next token to predict: -100 is left out of the loss.
            targets_N = torch.nn.functional.pad(ids_BT[:, 1:], (0, 1), value=-100).flatten()
            for here_ND, there_ND, labels_N in zip(
                hidden_ND.split(_CHUNK_TOKENS),
                dense_BTD.flatten(0, 1).split(_CHUNK_TOKENS),
                targets_N.split(_CHUNK_TOKENS),
                strict=True,
            ):
                log_q_NV = torch.nn.functional.linear(here_ND, head_VD).float().log_softmax(-1)
                loss += torch.nn.functional.nll_loss(log_q_NV, labels_N, reduction="sum").item()
                log_p_NV = torch.nn.functional.linear(there_ND, self._head_VD).float().log_softmax(-1)
                log_q_NV.neg_().add_(log_p_NV)
                kl += torch.einsum("nv,nv->", log_p_NV.exp_(), log_q_NV).item()
        predictions = count * (length - 1)
        mean = loss / predictions
        return Fidelity(kl / (count * length), math.exp(mean) if mean < 700 else math.inf)


def _hidden(model: DarwinLMForCausalLM, ids_BT: Tensor) -> Tensor:
    hidden: Tensor = model.model(ids_BT, use_cache=False).last_hidden_state
    return hidden
