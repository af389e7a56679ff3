"""Short training loop for trials; recovery uses the Hugging Face Trainer."""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

from darwinlm.models.balance import balance_loss, watched_routers
from darwinlm.models.device_memory import Portion, free_memory, kept_bytes
from darwinlm.models.heads import Head
from darwinlm.models.loading import fast_dtype
from darwinlm.models.modeling_darwinlm import PrunedConfig, PrunedModel
from darwinlm.models.streaming import is_streamed, learn_with
from darwinlm.optim.learning_rate import LearningRate, parameter_groups
from darwinlm.optim.sign_sgd import TOGETHER, SignSGD

_SHARE = 0.5
"""Fraction of free memory that activations may take before they are recomputed instead."""
_Tensors = tuple[Tensor, ...]
Optimizer = Literal["sign", "adamw"]


def train_briefly(
    model: PrunedModel,
    blocks_BT: Tensor,
    *,
    optimizer: Optimizer = "adamw",
    rate: LearningRate,
    batch_size: int,
    target_rows_BTD: Tensor | None = None,
    portion: Portion | None = None,
    balance: float = 0.0,
) -> bool:
    """Train the layers of `model` in place, once over `blocks_BT`, at a constant rate.

    It computes in bfloat16 where the hardware is faster with it, otherwise in float32. `SignSGD` trains the compute
    weights directly. AdamW trains float32 master weights: at a learning rate of 1e-5 a bfloat16 weight of 0.02 could
    not move. Embeddings and head are frozen, because all candidates share them. If memory is short, activations are
    recomputed layer by layer (gradient checkpointing).

    Args:
        model: its layers must not be shared, and be float32 for AdamW; afterwards they are in the compute dtype. The
            rest may be shared with other models and in any dtype.
        blocks_BT: token ids, (blocks, tokens), on any device.
        optimizer: `sign` or `adamw`.
        rate: learning rate, without weight decay. AdamW clips gradients to a norm of 1 unless the rate is relative.
        batch_size: blocks per optimizer step.
        target_rows_BTD: mean head rows of the dense model (`DenseReference.mean_head_rows`), on any device; the loss is
            then KL(dense || model). By default it is next-token loss.
        portion: number of blocks per forward pass, with gradient accumulation; by default as many as fit.
        balance: coefficient of the experts' load-balancing loss, which is added.

    Returns:
        False if training diverged (the model is then unusable).
    """
    model.requires_grad_(False).train()
    model.model.layers.requires_grad_(True)
    parameters = list(model.model.layers.parameters())
    dtype = fast_dtype(model.device)
    masters = parameters
    if dtype != torch.float32 and optimizer == "adamw":
        masters = [torch.nn.Parameter(parameter.detach().float()) for parameter in parameters]
        working = [torch.empty_like(parameter, dtype=dtype) for parameter in parameters]
        torch._foreach_copy_(working, [parameter.data for parameter in parameters])
        for parameter, copied in zip(parameters, working, strict=True):
            parameter.data = copied
    model.to(dtype)
    portion = portion or Portion(batch_size, "trial")
    tokens = min(portion.size, len(blocks_BT)) * blocks_BT.shape[1]
    kept = kept_bytes(cast(PrunedConfig, model.config), tokens, blocks_BT.shape[1], dtype)
    streamed = is_streamed(model)
    recompute = not streamed and kept > _SHARE * free_memory(model.device)
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    signs = SignSGD(parameters, rate, model.device, streamed=streamed) if optimizer == "sign" else None
    if streamed:
        if signs is None:
            raise ValueError("streamed layers can only be trained with the `sign` optimizer")
        learn_with(model, signs.learn)
    adam = Adam(masters, rate) if optimizer == "adamw" else None
    for number, batch_BT in enumerate(blocks_BT.split(batch_size)):
        batch_BT = batch_BT.to(model.device, torch.long)
        rows_BTD = None
        if target_rows_BTD is not None:
            rows_BTD = target_rows_BTD[number * batch_size :][: len(batch_BT), :-1].to(model.device)
        portion(partial(_gradients, model, parameters, masters, batch_BT, rows_BTD, balance, signs))
        if adam is None:
            continue
        # With a relative rate there is no clipping: the gradient norm depends on how a model's weights are scaled.
        if not torch.nn.utils.clip_grad_norm_(masters, math.inf if rate.relative else 1.0).isfinite():
            return False
        adam.step()
        if masters is not parameters:
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
    if recompute:
        model.activation_checkpointing_disable()
    if streamed:
        learn_with(model, None)
    model.eval()
    return signs is None or signs.close()


def _gradients(
    model: PrunedModel,
    parameters: Sequence[Tensor],
    masters: Sequence[Tensor],
    batch_BT: Tensor,
    rows_BTD: Tensor | None,
    balance: float,
    signs: SignSGD | None,
    size: int,
) -> None:
    """Leave the gradients of the mean loss over `batch_BT` in `masters`, from `size` blocks at a time; with `signs`,
    take its step instead.

    `rows_BTD` are the expected head rows at all positions except each block's last; by default the rows of the next
    tokens.
    """
    for each in (*parameters, *masters):
        each.grad = None  # Discard gradients of an attempt that ran out of memory.
    head, parts = Head.of(model), batch_BT.split(size)
    if signs is not None:
        signs.begin()
    for number, part_BT in enumerate(parts):
        if signs is not None:
            signs.backward_is(last=number == len(parts) - 1)
        with watched_routers(model, wanted=balance > 0) as logits:
            hidden_BTD = model.model(input_ids=part_BT, use_cache=False).last_hidden_state[:, :-1]
        hidden_ND = hidden_BTD.detach().flatten(0, 1)
        if rows_BTD is None:
            target_rows_ND = head.rows(part_BT[:, 1:].flatten(), hidden_ND)
        else:
            target_rows_ND = rows_BTD[number * size :][: len(part_BT)].flatten(0, 1)
        by_hidden_ND = (head.mean_head_rows(hidden_ND).float() - target_rows_ND.float()) / batch_BT[:, 1:].numel()
        losses, gradients = [hidden_BTD], [by_hidden_ND.view(hidden_BTD.shape).to(hidden_BTD.dtype)]
        if logits:
            losses.append(balance * balance_loss(cast(PrunedConfig, model.config), logits))
            gradients.append(torch.full_like(losses[-1], len(part_BT) / len(batch_BT)))
        torch.autograd.backward(losses, gradients)
        pairs = zip(masters, parameters, strict=True)
        working = [pair for pair in pairs if pair[0] is not pair[1] and pair[1].grad is not None]
        for part in _parts([master for master, _ in working]):
            some = working[part]
            copies = [torch.empty_like(master) for master, _ in some]
            torch._foreach_copy_(copies, [cast(Tensor, parameter.grad) for _, parameter in some])
            for (master, parameter), gradient in zip(some, copies, strict=True):
                parameter.grad = None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    if signs is not None:
        signs.end()


class Adam:
    """AdamW without weight decay (Loshchilov and Hutter, 2019, arXiv 1711.05101), with betas 0.9 and 0.999.

    At a relative rate every tensor has its own rate, and PyTorch's optimizers process one rate at a time, with four
    more kernel launches per tensor, which dominate in small models. Here tensors of all rates are processed together.
    """

    def __init__(self, parameters: Sequence[Tensor], rate: LearningRate) -> None:
        """Start training `parameters` (float32) that get a gradient in the first step and, at a relative rate, are not
        all zeros."""
        self._steps = 0
        groups = parameter_groups(parameters, rate)
        trained = [(tensor, group["lr"], group.get("eps", 1e-8)) for group in groups for tensor in group["params"]]
        self._parts = [trained[part] for part in _parts([tensor for tensor, _, _ in trained])]
        self._moments: list[tuple[_Tensors, _Tensors]] = []

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters by their gradients, and free these."""
        self._steps += 1
        first, second = 1 - 0.9**self._steps, 1 - 0.999**self._steps
        if self._steps == 1:
            learnt = [[one for one in part if one[0].grad is not None] for part in self._parts]
            self._parts = [part for part in learnt if part]
        for number, part in enumerate(self._parts):
            tensors, rates, least = map(list, zip(*part, strict=True))
            gradients = [tensor.grad for tensor in tensors]
            if self._steps == 1:
                means, squares = torch._foreach_mul(gradients, 0.1), torch._foreach_mul(gradients, gradients)
                torch._foreach_mul_(squares, 0.001)
                self._moments.append((means, squares))
            else:
                means, squares = self._moments[number]
                torch._foreach_lerp_(means, gradients, 0.1)
                torch._foreach_mul_(squares, 0.999)
                torch._foreach_addcmul_(squares, gradients, gradients, 0.001)
            for tensor in tensors:
                tensor.grad = None
            del gradients
            sizes = torch._foreach_sqrt(squares)
            torch._foreach_div_(sizes, second**0.5)
            torch._foreach_add_(sizes, least)
            torch._foreach_addcdiv_(tensors, means, sizes, [-rate / first for rate in rates])


def _parts(tensors: Sequence[Tensor]) -> list[slice]:
    """Group consecutive tensors to be processed together, limiting temporary memory."""
    if not tensors:
        return []
    ends, together = [0], 0
    for number, tensor in enumerate(tensors):
        if together and together + tensor.numel() > TOGETHER:
            ends.append(number)
            together = 0
        together += tensor.numel()
    return [slice(*pair) for pair in itertools.pairwise([*ends, len(tensors)])]
