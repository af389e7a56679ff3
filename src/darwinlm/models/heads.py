"""LM heads: from last hidden states to logits, and back to gradients.

Most heads are a matrix product. Granite and Cohere scale logits, Phi adds a bias, and Gemma 2 uses a softcap.

Dimension letters: N positions, V vocabulary, D hidden size.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from darwinlm.models.modeling_darwinlm import PrunedConfig, PrunedModel

_CHUNK_TOKENS = 128
"""Minimum number of positions whose logits are computed at a time; fits the cache of a CPU."""
_CHUNK_LOGITS = 2**27
"""Maximum number of logits at a time on other devices, where each chunk reads the whole head: 0.5 GB in float32."""


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Return the number of positions whose logits are computed at a time."""
    return _CHUNK_TOKENS if device.type == "cpu" else max(_CHUNK_TOKENS, _CHUNK_LOGITS // vocabulary)


def shape_logits(config: PrunedConfig, logits: Tensor) -> Tensor:
    """Apply a model's scale and softcap to the output of its `lm_head`."""
    scale, softcap = logit_settings(config)
    logits = logits if scale == 1 else logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logit_settings(config: PrunedConfig) -> tuple[float, float | None]:
    """Return the scale of the logits, and their softcap or None."""
    scale: Any = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return float(scale), getattr(config, "final_logit_softcapping", None)


@dataclass(frozen=True)
class Head:
    """LM head with logits `softcap * tanh(z / softcap)` of `z = scale * (h W^T + b)`, or z without a softcap."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None
    wide: bool = False
    """Whether logits are float32 although the weight is not: products are exact and tensor cores sum in float32."""

    @classmethod
    def of(cls, model: PrunedModel) -> "Head":
        """Create the head of `model`; the tensors are shared."""
        linear = model.get_output_embeddings()
        return cls(linear.weight, getattr(linear, "bias", None), *logit_settings(model.config))

    def float(self) -> "Head":
        """Return the same head with logits in float32."""
        bias_V = self.bias_V if self.bias_V is None else self.bias_V.float()
        if self.weight_VD.is_cuda and self.weight_VD.dtype in (torch.bfloat16, torch.float16):
            return replace(self, bias_V=bias_V, wide=True)
        return replace(self, weight_VD=self.weight_VD.float(), bias_V=bias_V)

    def logits(self, hidden_ND: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute logits (N, V) in the dtype of the head, written to `out` if given; without gradients."""
        weight_VD = self.weight_VD
        if self.wide and hidden_ND.dtype == weight_VD.dtype:
            # Products of half-precision numbers are exact in float32.
            logits_NV = torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32)
            logits_NV = logits_NV if out is None else out.copy_(logits_NV)
        else:
            dtype = torch.float32 if self.wide else weight_VD.dtype
            logits_NV = torch.mm(hidden_ND.to(dtype), weight_VD.to(dtype).T, out=out)
        if self.bias_V is not None:
            logits_NV += self.bias_V
        if self.scale != 1:
            logits_NV *= self.scale
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV

    def back(self, by_logits_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """Convert a gradient w.r.t. logits, taken at `logits_NV`, to one w.r.t. last hidden states, (N, D)."""
        if self.softcap is not None:
            by_logits_NV = by_logits_NV * (1 - (logits_NV / self.softcap).square())
        dtype = torch.float32 if self.wide else self.weight_VD.dtype
        by_hidden_ND = by_logits_NV.to(dtype) @ self.weight_VD.to(dtype)
        return by_hidden_ND if self.scale == 1 else by_hidden_ND * self.scale

    def rows(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the gradient of the logits of the tokens `ids` (of any shape) w.r.t. the hidden states there: (*shape,
        D)."""
        rows = torch.nn.functional.embedding(ids, self.weight_VD)
        if self.softcap is not None:
            z = self.scale * (rows * hidden).sum(-1, keepdim=True)
            if self.bias_V is not None:
                z = z + self.scale * self.bias_V[ids].unsqueeze(-1)
            rows = rows * (1 - torch.tanh(z / self.softcap).square())
        return rows if self.scale == 1 else rows * self.scale

    @torch.no_grad()
    def mean_head_rows(self, hidden_ND: Tensor) -> Tensor:
        """Return the softmax-weighted mean of `rows` at these last hidden states, (N, D), in the dtype of the head.

        This is the gradient of log-sum-exp w.r.t. the hidden states. The gradient of next-token loss is this minus the
        row of the next token; that of KL(dense || model) is this minus the dense model's mean, which is approximate
        with a softcap and exact where the models agree.
        """
        parts = []
        for part_ND in hidden_ND.split(chunk_tokens(len(self.weight_VD), hidden_ND.device)):
            logits_NV = self.logits(part_ND)
            parts.append(self.back(logits_NV.float().softmax(-1), logits_NV))
        return torch.cat(parts)
