"""Training loss of recovery: next-token loss, mixed with KL from the dense model's predictions.

Dimension letters: B blocks, T tokens, N tokens of a chunk, K likeliest tokens, L = K + 1, D hidden size, V vocabulary.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from darwinlm.models.balance import balance_loss, watched_routers
from darwinlm.models.heads import shape_logits
from darwinlm.models.modeling_darwinlm import PrunedModel

_CHUNK_TOKENS = 1024


class Objective(nn.Module):
    """A model with its loss; logits are computed for a chunk of tokens at a time, and recomputed for the gradient."""

    accepts_loss_kwargs = True
    """Makes the Trainer pass the total number of predictions in an optimizer step, over all ranks."""

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
            model: model to train.
            teacher: dense model; needed if `share` is above 0, unless its predictions come with the text.
            share: weight of KL(teacher || model) in the loss; the rest is next-token loss.
            temperature: divides both models' logits in the KL, which is multiplied by its square.
            balance: coefficient of the experts' load-balancing loss (`balance_loss`), which is added.
        """
        super().__init__()
        self.model = model
        self._share = share
        self._temperature = temperature
        self._balance = balance
        # Stored in a tuple, so that its weights are not registered in this module.
        self._teacher = (teacher,)

    @property
    def distils(self) -> bool:
        """Whether KL is part of the loss."""
        return self._share > 0

    def mix(self, next_token: Any, kl: Any) -> Any:
        """Combine the two parts of the loss."""
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
        """Return `loss` in nats per prediction, and its `sums`: next-token loss, KL, number of predictions.

        Args:
            input_ids: (B, T).
            labels: (B, T); a token with label -100 is predicted in neither part of the loss.
            num_items_in_batch: divisor of the sums in `loss`, if these blocks are part of a larger batch.
            position_ids: (B, T), if they are not consecutive: a token attends to nothing before the last 0.
            top_ids: (B, T, K), the teacher's likeliest next tokens, in place of a teacher: the KL is then over K + 1
                outcomes, these and "another token", and never larger than over all tokens.
            top_log_p: (B, T, K + 1), their log-probabilities at the temperature.
        """
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        with watched_routers(self.model, wanted=self._balance > 0) as logits:
            hidden_ND = self.model.model(**inputs).last_hidden_state.flatten(0, 1)
        # A block's last position has no next token.
        targets_N = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        (teacher,) = self._teacher
        teacher_ND = hidden_ND
        if teacher is not None:
            with torch.no_grad():
                teacher_ND = teacher.model(**inputs).last_hidden_state.flatten(0, 1)
        sums = torch.zeros(2, device=hidden_ND.device)
        for rows in torch.arange(len(hidden_ND), device=hidden_ND.device).split(_CHUNK_TOKENS):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            # FSDP needs the head's full weights, so this runs inside the root module's forward pass, even without
            # gradients.
            sums = sums + cast(
                Tensor,
                checkpoint(
                    self._sums,
                    hidden_ND[part],
                    teacher_ND[part].detach(),
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
            # Weighted by its share of the optimizer step's predictions, like the rest of the loss.
            loss = loss + self._balance * balance_loss(self.model.config, logits) * predictions / count
        return {"loss": loss, "sums": torch.cat([sums.detach(), predictions.to(sums.dtype)[None]])}

    def _sums(
        self,
        hidden_ND: Tensor,
        teacher_ND: Tensor,
        targets_N: Tensor,
        top_ids_NK: Tensor | None,
        top_log_p_NL: Tensor | None,
    ) -> Tensor:
        """Return the sums of next-token loss and of KL over a chunk, in float32.

        Memory peaks here, so no tensor of the size of the logits is kept longer than necessary.
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
                log_p = shape_logits(teacher.config, teacher.lm_head(teacher_ND)).float()
                log_p = log_p.div_(self._temperature).log_softmax(-1)
            log_q = log_q_NV
        gap = log_p - log_q
        log_p = log_p.exp()
        each_N = (log_p * gap).sum(-1)
        kl = self._temperature**2 * each_N.masked_fill(targets_N == -100, 0).sum()
        return torch.stack([loss, kl])


def log_mass_of_others(log_p_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Return the log-probability of all tokens except those in `ids_NK`, (N, 1), by a sum: a difference would be
    inaccurate."""
    return log_p_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1, keepdim=True)
