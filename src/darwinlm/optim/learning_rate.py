"""Learning rates relative to the size of the weights.

AdamW moves every weight by about the learning rate, whatever its size, so the same rate is a small step for one model
and destroys another. A relative rate is multiplied by the root mean square of each tensor. As with Adafactor's relative
step size and LAMB's trust ratio, training does not change if a model's projections are scaled down and the norms before
them up.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_EPS = 1e-8
"""AdamW's epsilon, in nats per relative change. Tensors with almost no gradient, such as head rows of tokens that do
not occur, stay unchanged: a step by the sign of noise would only do harm."""


@dataclass(frozen=True, slots=True)
class LearningRate:
    """AdamW learning rate."""

    value: float
    relative: bool = False
    """Whether the rate is in units of each tensor's root mean square before the first step."""


def parameter_groups(
    parameters: Iterable[Tensor],
    rate: LearningRate,
    weight_decay: float = 0.0,
    sizes: Mapping[Tensor, float] | None = None,
) -> list[dict[str, Any]]:
    """Return `torch.optim.AdamW` parameter groups with this rate: one per tensor if the rate is relative.

    Args:
        parameters: sharded or not; all ranks call it with theirs.
        rate: learning rate of all parameters.
        weight_decay: fraction of a weight removed per step, times the rate.
        sizes: unit of the rate for tensors where it is not their own root mean square. A tensor of zeros has no unit
            and is not trained at a relative rate.
    """
    if not rate.relative:
        return [{"params": list(parameters), "lr": rate.value, "weight_decay": weight_decay}]
    trained, groups = list(parameters), []
    for parameter, own in zip(trained, root_mean_squares(trained), strict=True):
        size = sizes.get(parameter, own) if sizes else own
        if size > 0:
            groups.append(
                {
                    "params": [parameter],
                    "lr": rate.value * size,
                    "eps": _EPS / size,
                    "weight_decay": weight_decay / size,
                }
            )
    return groups


def root_mean_squares(tensors: Sequence[Tensor]) -> list[float]:
    """Return the root mean square of each tensor, over all ranks if it is sharded, with one device synchronization."""
    if tensors and all(type(tensor.data) is Tensor for tensor in tensors):
        norms: list[float] = torch.stack(
            torch._foreach_norm([tensor.detach() for tensor in tensors], dtype=torch.float32)
        ).tolist()
        return [norm / math.sqrt(tensor.numel()) for norm, tensor in zip(norms, tensors, strict=True)]
    totals = [tensor.detach().float().square().sum() for tensor in tensors]
    whole = [total.full_tensor() if isinstance(total, DTensor) else total for total in totals]
    sums: list[float] = torch.stack(whole).tolist() if whole else []
    return [math.sqrt(total / tensor.numel()) for total, tensor in zip(sums, tensors, strict=True)]
