"""What recovery minimises: next-token loss, mixed with KL from the dense model's predictions.

Dimension letters: B blocks, T tokens, N tokens of a chunk, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from darwinlm.adapters.modeling_darwinlm import DarwinLMForCausalLM

_CHUNK_TOKENS = 1024


class Objective(nn.Module):
    """A model with its loss; logits exist for a chunk of tokens at a time, and are computed again for the gradient."""

    def __init__(self, model: DarwinLMForCausalLM, teacher: DarwinLMForCausalLM | None, share: float) -> None:
        """Wrap `model`.

        Args:
            model: trained.
            teacher: the dense model; needed where `share` is above 0.
            share: of KL(teacher || model) in the loss; the rest is next-token loss.
        """
        super().__init__()
        self.model = model
        self._share = share
        # In a tuple: its weights are not this module's.
        self._teacher = (teacher,)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`loss` (nats a token) of the blocks `input_ids`, B * T; label -100 is left out of the next-token loss."""
        hidden_ND = self.model.model(input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        # A block's last position has no next token.
        targets_N = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        (teacher,) = self._teacher
        taught_ND = hidden_ND
        if teacher is not None and self._share > 0:
            with torch.no_grad():
                taught_ND = teacher.model(input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        sums = torch.zeros(2, device=hidden_ND.device)
        for rows in torch.arange(len(hidden_ND), device=hidden_ND.device).split(_CHUNK_TOKENS):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            sums = sums + checkpoint(
                self._sums, hidden_ND[part], taught_ND[part].detach(), targets_N[part], use_reentrant=False
            )
        next_token = sums[0] / (targets_N != -100).sum().clamp_min(1)
        return {"loss": (1 - self._share) * next_token + self._share * sums[1] / len(hidden_ND)}

    def _sums(self, hidden_ND: Tensor, taught_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Of next-token loss and of KL over a chunk, in float32."""
        log_q_NV = self.model.lm_head(hidden_ND).float().log_softmax(-1)
        loss = nn.functional.nll_loss(log_q_NV, targets_N, ignore_index=-100, reduction="sum")
        kl = loss.new_zeros(())
        (teacher,) = self._teacher
        if teacher is not None and self._share > 0:
            with torch.no_grad():
                log_p_NV = teacher.lm_head(taught_ND).float().log_softmax(-1)
            kl = nn.functional.kl_div(log_q_NV, log_p_NV, log_target=True, reduction="sum")
        return torch.stack([loss, kl])
