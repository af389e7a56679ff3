"""What recovery minimises: next-token loss, mixed with KL from the dense model's predictions.

Dimension letters: B blocks, T tokens, N tokens of a chunk, K likeliest tokens, L = K + 1, D hidden size, V vocabulary.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from darwinlm.adapters.balance import balance_loss, watched_routers
from darwinlm.adapters.heads import shape_logits
from darwinlm.adapters.modeling_darwinlm import PrunedModel

_CHUNK_TOKENS = 1024


class Objective(nn.Module):
    """A model with its loss; logits exist for a chunk of tokens at a time, and are computed again for the gradient."""

    accepts_loss_kwargs = True
    """The Trainer hands over how many predictions an optimiser step has in all, on all ranks."""

    def __init__(
        self,
        model: PrunedModel,
        teacher: PrunedModel | None,
        share: float,
        temperature: float = 1.0,
        balance: float = 0.0,
    ) -> None:
        """Wrap `model`.

        Args:
            model: trained.
            teacher: the dense model; needed where `share` is above 0, unless its predictions come with the text.
            share: of KL(teacher || model) in the loss; the rest is next-token loss.
            temperature: that both models' logits are divided by in KL, which is multiplied by its square.
            balance: what the loss that spreads tokens over experts (`balance_loss`) is multiplied by; it is added.
        """
        super().__init__()
        self.model = model
        self._share = share
        self._temperature = temperature
        self._balance = balance
        # In a tuple: its weights are not this module's.
        self._teacher = (teacher,)

    @property
    def distils(self) -> bool:
        """Whether KL is a part of the loss."""
        return self._share > 0

    def mix(self, next_token: Any, kl: Any) -> Any:
        """The loss of its two parts."""
        return (1 - self._share) * next_token + self._share * kl

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        position_ids: Tensor | None = None,
        top_ids: Tensor | None = None,
        top_log_p: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`loss` in nats a prediction, and the `sums` it is made of: next-token loss, KL, predictions.

        Args:
            input_ids: B * T.
            labels: B * T; where the label is -100, the prediction of this token counts in neither part.
            num_items_in_batch: what `loss` divides the sums by, if these blocks are a part of a larger batch.
            position_ids: B * T, if they are not just counted: a token attends to nothing before the last 0.
            top_ids: B * T * K, the teacher's likeliest next tokens, in place of a teacher: KL is then that of K + 1
                outcomes, these and "another token", and never above that of all tokens.
            top_log_p: B * T * (K + 1), their log-probabilities at the temperature.
        """
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        with watched_routers(self.model, wanted=self._balance > 0) as logits:
            hidden_ND = self.model.model(**inputs).last_hidden_state.flatten(0, 1)
        # A block's last position has no next token.
        targets_N = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        (teacher,) = self._teacher
        taught_ND = hidden_ND
        if teacher is not None:
            with torch.no_grad():
                taught_ND = teacher.model(**inputs).last_hidden_state.flatten(0, 1)
        sums = torch.zeros(2, device=hidden_ND.device)
        for rows in torch.arange(len(hidden_ND), device=hidden_ND.device).split(_CHUNK_TOKENS):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            # Traced even without gradients, FSDP needs the head's weights whole: this runs inside the root's forward.
            sums = sums + cast(
                Tensor,
                checkpoint(
                    self._sums,
                    hidden_ND[part],
                    taught_ND[part].detach(),
                    targets_N[part],
                    None if top_ids is None else top_ids.flatten(0, 1)[part],
                    None if top_log_p is None else top_log_p.flatten(0, 1)[part],
                    use_reentrant=False,
                ),
            )
        predictions = (targets_N != -100).sum()
        count = predictions.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        loss = self.mix(sums[0], sums[1]) / count
        if logits:
            # By its share of the optimiser step's predictions, as the rest of the loss.
            loss = loss + self._balance * balance_loss(self.model.config, logits) * predictions / count
        return {"loss": loss, "sums": torch.cat([sums.detach(), predictions.to(sums.dtype)[None]])}

    def _sums(
        self,
        hidden_ND: Tensor,
        taught_ND: Tensor,
        targets_N: Tensor,
        top_ids_NK: Tensor | None,
        top_log_p_NL: Tensor | None,
    ) -> Tensor:
        """Of next-token loss and of KL over a chunk, in float32.

        Memory is at its peak here: no tensor of the size of the logits lives longer than it has to.
        """
        logits_NV = shape_logits(self.model.config, self.model.lm_head(hidden_ND)).float()
        log_q_NV = logits_NV.log_softmax(-1)
        loss = nn.functional.nll_loss(log_q_NV, targets_N, ignore_index=-100, reduction="sum")
        (teacher,) = self._teacher
        if teacher is None and top_ids_NK is None:
            return torch.stack([loss, loss.new_zeros(())])
        if self._temperature != 1:
            log_q_NV = (logits_NV / self._temperature).log_softmax(-1)
        del logits_NV
        if top_ids_NK is not None and top_log_p_NL is not None:
            ids_NK, log_p = top_ids_NK.long(), top_log_p_NL
            log_q = torch.cat([log_q_NV.gather(-1, ids_NK), log_mass_of_others(log_q_NV, ids_NK)], -1)
        else:
            assert teacher is not None
            with torch.no_grad():
                log_p = shape_logits(teacher.config, teacher.lm_head(taught_ND)).float()
                log_p = log_p.div_(self._temperature).log_softmax(-1)
            log_q = log_q_NV
        gap = log_p - log_q
        log_p = log_p.exp()
        each_N = (log_p * gap).sum(-1)
        kl = self._temperature**2 * each_N.masked_fill(targets_N == -100, 0).sum()
        return torch.stack([loss, kl])


def log_mass_of_others(log_p_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """The log-probability of all tokens but those of `ids_NK`, N * 1; summed up, since a difference would be noise."""
    return log_p_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1, keepdim=True)
