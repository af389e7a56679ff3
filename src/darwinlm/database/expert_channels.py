"""Channels to remove from each expert of a layer: the same number in all experts, whose weights form one tensor.

A token gets `sum_e g_e W_e c_e(x)`, and the gates g do not change. So each expert is its own site, pruned by the
second-order method on the tokens routed to it: its Gram matrix is the mean of `g_e^2 c_e c_e^T`, and interactions
between experts are ignored. Unit k of the layer is the channel of rank k in every expert. Afterwards the experts that
share a token compensate for each other: at each size the output projections are refitted, one after another, to the
remaining error of the layer's output, as for whole experts.

The Gram matrix of a rarely used expert is unreliable. Its channels are chosen on all tokens instead, weighted by the
softmax over all experts.

Dimension letters: N tokens, E experts, D hidden size, I channels of an expert, K kept channels.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from darwinlm.database.experts import FEWEST_TOKENS, Routed, refit_experts
from darwinlm.database.grams import ExpertStatistics
from darwinlm.database.solver import Snapshot, prune_site
from darwinlm.models.experts import Experts


@torch.no_grad()
def prune_expert_channels(
    experts: Experts, statistics: ExpertStatistics, *, sizes: Sequence[int], damping: float, name: str
) -> tuple[list[Snapshot], float]:
    """Remove channels of every expert one by one, and refit the remaining ones at each size.

    Args:
        experts: experts of the layer, float32, on the device to work on.
        statistics: their inputs on the calibration text.
        sizes: numbers of channels to keep per expert, descending.
        damping: lambda in H = G + lambda * mean(diag G) * I, and the minimum ridge of the refit.
        name: name of the site, for log lines.

    Returns:
        One snapshot per size, with `channels_EK`, and `weight_OK` of shape (E, D, K) or as stored in the model; and the
        error of removing all channels.

    Raises:
        LinAlgError: if a Gram matrix is numerically singular.
    """
    routed = Routed.of(experts, statistics, name)
    by_expert = [
        prune_site(
            experts.down_EDI[expert], _gram(experts, routed, expert), columns_per_unit=1, sizes=sizes, damping=damping
        )
        for expert in range(experts.count)
    ]
    snapshots = []
    for number, size in enumerate(sizes):
        channels_EK = torch.tensor([levels[number].kept for levels in by_expert])
        down_EDK = torch.stack([levels[number].weight_OK for levels in by_expert])
        left = replace(experts.narrowed(channels_EK.to(down_EDK.device)), down_EDI=down_EDK)
        down_EDK, error = refit_experts(left, routed, routed.logits_NE, damping)
        snapshots.append(
            Snapshot(
                kept=tuple(range(size)), weight_OK=experts.as_stored(down_EDK), error=error, channels_EK=channels_EK
            )
        )
    return snapshots, routed.removal_error


def _gram(experts: Experts, routed: Routed, expert: int) -> Tensor:
    """Return the Gram matrix of an expert's output projection inputs, including gates and token weights."""
    gates_N = routed.gates_NE[:, expert]
    if int((gates_N > 0).sum()) < FEWEST_TOKENS:
        gates_N = routed.logits_NE.softmax(-1)[:, expert]
    rows = gates_N.nonzero()[:, 0]
    channels_NI = experts.channels(expert, routed.x_ND[rows]) * (gates_N[rows] * routed.weights_N[rows])[:, None]
    return channels_NI.T @ channels_NI / len(routed.x_ND)
