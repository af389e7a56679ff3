"""The one short training loop: trials use it; recovery uses the Hugging Face Trainer."""

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from darwinlm.adapters.loading import fast_dtype
from darwinlm.adapters.memory import Portion, free_memory, kept_bytes
from darwinlm.adapters.modeling_darwinlm import DarwinLMConfig, DarwinLMForCausalLM

_SHARE = 0.5
"""Of what is free, what activations may take before they are computed again instead."""


def train_briefly(
    model: DarwinLMForCausalLM,
    blocks_BT: Tensor,
    *,
    learning_rate: float,
    batch_size: int,
    portion: Portion | None = None,
) -> float:
    """Train the layers of `model` in place on next-token loss, once over `blocks_BT`, with AdamW at a constant rate.

    Weights are float32: at a learning rate of 1e-5 a bfloat16 weight of 0.02 could not move. Where the hardware is
    faster in bfloat16, a working copy of them in that does the computing. Embeddings and head stay as they are: they
    are the same in all candidates. Where memory is short, each layer's activations are computed again for its gradient.

    Args:
        model: its layers float32 and its own; afterwards in the dtype that it was trained in, rounded from the float32
            weights. The rest may be shared with other models and in any dtype.
        blocks_BT: token ids, blocks * tokens, on any device.
        learning_rate: AdamW's, without weight decay.
        batch_size: blocks in one optimiser step.
        portion: how many of them are computed at a time, gradients adding up; by default all that fit.

    Returns:
        The last step's loss in nats; infinite if the training diverged (the model is then useless).
    """
    model.requires_grad_(False).train()
    model.model.layers.requires_grad_(True)
    parameters = list(model.model.layers.parameters())
    dtype = fast_dtype(model.device)
    masters = parameters
    if dtype != torch.float32:
        masters = [torch.nn.Parameter(parameter.detach().float()) for parameter in parameters]
    model.to(dtype)  # type: ignore[arg-type]
    portion = portion or Portion(batch_size, "trial")
    tokens = min(portion.size, len(blocks_BT)) * blocks_BT.shape[1]
    recompute = kept_bytes(cast(DarwinLMConfig, model.config), tokens, dtype) > _SHARE * free_memory(model.device)
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(masters, lr=learning_rate, weight_decay=0.0, fused=True)
    loss = math.nan
    for batch_BT in blocks_BT.split(batch_size):
        loss = portion(partial(_gradients, model, parameters, masters, batch_BT.to(model.device, torch.long)))
        if not math.isfinite(loss):
            return math.inf
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if masters is not parameters:
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
    if recompute:
        model.activation_checkpointing_disable()
    model.eval()
    return loss


def _gradients(
    model: DarwinLMForCausalLM,
    parameters: Sequence[Tensor],
    masters: Sequence[Tensor],
    batch_BT: Tensor,
    size: int,
) -> float:
    """Leave the gradients of the mean loss over `batch_BT` in `masters`, from `size` blocks at a time; that loss."""
    for each in (*parameters, *masters):
        each.grad = None  # of an attempt that ran out of memory
    loss = 0.0
    for part_BT in batch_BT.split(size):
        part = model(input_ids=part_BT, labels=part_BT, use_cache=False).loss * (len(part_BT) / len(batch_BT))
        part.backward()
        loss += part.item()
        for master, parameter in zip(masters, parameters, strict=True):
            if master is not parameter and parameter.grad is not None:
                gradient, parameter.grad = parameter.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad + gradient
    return loss
