"""Learning rates relative to the weights that they move.

AdamW moves every weight by about the learning rate, whatever its size, so the same rate is a small step for one model
and a ruinous one for another. In units of the root mean square of each tensor a rate says what share of itself a tensor
may change by. As Adafactor's relative step size and LAMB's trust ratio do, this makes the training of a model the same
if its projections are scaled down and the norms before them up.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_EPS = 1e-8
"""AdamW's, in nats a relative change. What has hardly a gradient, such as the rows of a head whose tokens do not occur,
stays where it is: a step by the sign of noise would only do harm."""


@dataclass(frozen=True, slots=True)
class LearningRate:
    """A learning rate of AdamW."""

    value: float
    relative: bool = False
    """In units of the root mean square of each tensor, as it is before the first step."""


def parameter_groups(
    parameters: Iterable[Tensor],
    rate: LearningRate,
    weight_decay: float = 0.0,
    sizes: Mapping[Tensor, float] | None = None,
) -> list[dict[str, Any]]:
    """The groups of `torch.optim.AdamW` that train `parameters` at this rate: one a tensor if it is relative.

    Args:
        parameters: sharded or not; all ranks call it with theirs.
        rate: the same for all.
        weight_decay: the share of itself that a weight loses in a step, by the rate.
        sizes: of tensors whose unit is not their own root mean square. A tensor of zeros has no size, and stays as it
            is at a relative rate.
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
    """The root mean square of each tensor, on all ranks if it is sharded; a device is waited for once."""
    if tensors and all(type(tensor.data) is Tensor for tensor in tensors):
        norms: list[float] = torch.stack(
            torch._foreach_norm([tensor.detach() for tensor in tensors], dtype=torch.float32)
        ).tolist()
        return [norm / math.sqrt(tensor.numel()) for norm, tensor in zip(norms, tensors, strict=True)]
    totals = [tensor.detach().float().square().sum() for tensor in tensors]
    whole = [total.full_tensor() if isinstance(total, DTensor) else total for total in totals]
    sums: list[float] = torch.stack(whole).tolist() if whole else []
    return [math.sqrt(total / tensor.numel()) for total, tensor in zip(sums, tensors, strict=True)]
