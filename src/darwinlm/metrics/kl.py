"""KL divergence from the dense model and perplexity, in float32, without storing tokens * vocabulary for a whole split.

Dimension letters: B blocks, T tokens per block, N tokens per chunk, D hidden size, V vocabulary, R random draws.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from darwinlm.models.device_memory import Portion
from darwinlm.models.heads import Head, chunk_tokens
from darwinlm.models.modeling_darwinlm import PrunedModel

_BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Fidelity:
    """KL and perplexity of a model on some text."""

    kl: float
    """KL(dense || model) in nats, averaged over all positions."""
    perplexity: float
    """Perplexity: exp of the mean next-token loss over all positions except each block's last."""
    kl_by_block: tuple[float, ...]
    """KL of each block; `kl` is their mean."""


class DenseReference:
    """Last hidden states of the dense model on some blocks: computed once, compared with any number of models."""

    @torch.no_grad()
    def __init__(self, dense: PrunedModel, blocks_BT: Tensor) -> None:
        self._blocks_BT = blocks_BT.to(dense.device, torch.long)
        self._head = Head.of(dense)
        self._batch = max(1, _BATCH_TOKENS // blocks_BT.shape[1])
        self._portion = Portion(min(self._batch, len(blocks_BT)), "scoring")
        self._hidden_BTD = torch.cat([self._hidden(dense, ids_BT) for ids_BT in self.batches()])

    def count(self, tokens: int | None) -> int:
        """Return how many blocks hold the first `tokens` tokens; by default all."""
        blocks, length = self._blocks_BT.shape
        return blocks if tokens is None else min(blocks, -(-tokens // length))

    def batches(self, count: int | None = None) -> tuple[Tensor, ...]:
        """Return the token ids of the first `count` blocks (default: all), in the batches used by comparisons."""
        batches: tuple[Tensor, ...] = self._blocks_BT[:count].split(self._batch)
        return batches

    @torch.no_grad()
    def compare(self, model: PrunedModel, tokens: int | None = None, *, head: Head | None = None) -> Fidelity:
        """Compute KL(dense || model) and perplexity.

        The model may compute in bfloat16: its last hidden states are passed to the head in float32.

        Args:
            model: the model to compare with the dense one.
            tokens: number of tokens of the text to use, rounded up to whole blocks; by default all.
            head: head to use in place of the model's own.

        Returns:
            Means over the tokens, in nats per token.

        """
        count = self.count(tokens)
        hidden = (self._hidden(model, ids_BT) for ids_BT in self.batches(count))
        return self.compare_hidden(hidden, head or Head.of(model), count)

    @torch.no_grad()
    def compare_hidden(self, hidden: Iterable[Tensor], head: Head, count: int | None = None) -> Fidelity:
        """Compute the same from last hidden states on the first `count` blocks, in the batches of `batches(count)`."""
        length = self._blocks_BT.shape[1]
        count = len(self._blocks_BT) if count is None else count
        head, dense = head.float(), self._head.float()
        # Buffers are reused for all chunks: on the CPU, allocating them costs more than the computation.
        vocabulary, device = len(head.weight_VD), head.weight_VD.device
        size = min(chunk_tokens(vocabulary, device), length)
        buffers = [torch.empty(size, vocabulary, device=device) for _ in range(3)]
        # By block and chunk; read at the end to avoid device synchronization.
        kls: list[list[Tensor]] = []
        losses: list[Tensor] = []
        dense_blocks = iter(self._hidden_BTD[:count])
        for hidden_BTD, ids_BT in zip(hidden, self.batches(count), strict=True):
            for hidden_TD, ids_T in zip(hidden_BTD, ids_BT, strict=True):
                # A block's last position has no next token to predict; the loss ignores -100.
                targets_T = torch.nn.functional.pad(ids_T[1:], (0, 1), value=-100)
                kls.append([])
                for here_ND, there_ND, labels_N in zip(
                    hidden_TD.split(size),
                    next(dense_blocks).split(size),
                    targets_T.split(size),
                    strict=True,
                ):
                    logits_NV, log_q_NV, log_p_NV = (buffer[: len(here_ND)] for buffer in buffers)
                    head.logits(here_ND, out=logits_NV)
                    torch.log_softmax(logits_NV, -1, out=log_q_NV)
                    losses.append(torch.nn.functional.nll_loss(log_q_NV, labels_N, reduction="sum"))
                    dense.logits(there_ND, out=logits_NV)
                    torch.log_softmax(logits_NV, -1, out=log_p_NV)
                    torch.sub(log_p_NV, log_q_NV, out=log_q_NV)
                    kls[-1].append(torch.dot(log_p_NV.exp_().view(-1), log_q_NV.view(-1)))
        sums = torch.stack([torch.stack(chunks) for chunks in kls]).tolist()
        by_block = [sum(chunks) / length for chunks in sums]
        mean = sum(torch.stack(losses).tolist()) / (count * (length - 1))
        return Fidelity(sum(by_block) / count, math.exp(mean) if mean < 700 else math.inf, tuple(by_block))

    @torch.no_grad()
    def mean_head_rows(self) -> Tensor:
        """Return the mean of the head's rows under the dense model's predictions, by position: (blocks, tokens, hidden
        size)."""
        return torch.stack([self._head.mean_head_rows(hidden_TD) for hidden_TD in self._hidden_BTD])

    @torch.no_grad()
    def gradients(self, hidden_TD: Tensor, block: int, head: Head, draws: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the first and second derivatives of KL(dense || model) on one block w.r.t. the last hidden states.

        With G the first result, a small change E of the hidden states changes the mean KL by about `sum(G * E) + mean
        over r of sum(F[r] * E)^2 / 2`. F are scores of tokens drawn from the model's own predictions: their second
        moment is the Fisher matrix, which is the Hessian of KL w.r.t. the logits.

        Args:
            hidden_TD: the model's last hidden states on the block.
            block: index of the block.
            head: head of the model.
            draws: number of random draws R.
            seed: seed of the draws.

        Returns:
            G, (tokens, hidden size), and F, (draws, tokens, hidden size); both float32.
        """
        length = len(hidden_TD)
        gradient_TD = torch.empty(hidden_TD.shape, device=hidden_TD.device)
        scores_RTD = torch.empty(draws, *hidden_TD.shape, device=hidden_TD.device)
        head, dense = head.float(), self._head.float()
        generator = torch.Generator(hidden_TD.device).manual_seed(seed)
        size = chunk_tokens(len(head.weight_VD), hidden_TD.device)
        for start in range(0, length, size):
            rows = slice(start, start + size)
            there_ND = self._hidden_BTD[block, rows]
            p_NV = dense.logits(there_ND).softmax(-1)
            logits_NV = head.logits(hidden_TD[rows])
            q_NV = logits_NV.softmax(-1)
            mean_ND = head.back(q_NV, logits_NV)
            gradient_TD[rows] = (mean_ND - head.back(p_NV, logits_NV)) / length
            if draws > 0:
                drawn_NR = torch.multinomial(q_NV, draws, replacement=True, generator=generator)
                drawn_RND = head.rows(drawn_NR.T, hidden_TD[rows].float())
                scores_RTD[:, rows] = (drawn_RND - mean_ND) / length**0.5
        return gradient_TD, scores_RTD

    def _hidden(self, model: PrunedModel, ids_BT: Tensor) -> Tensor:
        def run(size: int) -> Tensor:
            return torch.cat([model.model(part, use_cache=False).last_hidden_state for part in ids_BT.split(size)])

        return self._portion(run)
