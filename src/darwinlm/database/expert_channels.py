"""Which channels each expert of a layer loses: as many in all of them, since their tensors are one block of numbers.

A token gets `sum_e g_e W_e c_e(x)`, where the gates g stay as they are. So each expert is a site of its own, pruned by
the second-order method on the tokens that the router sends it: its Gram matrix is the mean of `g_e^2 c_e c_e^T`, and of
what it loses first in one expert and another nothing is asked. Unit k of the layer is the channel of rank k in every
expert. The experts that share a token then make up for one another: at each size the output projections are refitted,
one after another, to what the layer's output still lacks, as they are where whole experts go.

The Gram matrix of an expert that few tokens go to says little. Its channels are chosen by all tokens, each weighed by
the softmax over all experts: by how near it came to going there.

Dimension letters: N tokens, E experts, D hidden size, I channels of an expert, K of them that are kept.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from darwinlm.adapters.experts import Experts
from darwinlm.calibration.grams import ExpertStatistics
from darwinlm.database.experts import FEWEST_TOKENS, Routed, refit_experts
from darwinlm.database.solver import Snapshot, prune_site


@torch.no_grad()
def prune_expert_channels(
    experts: Experts, statistics: ExpertStatistics, *, sizes: Sequence[int], damping: float, name: str
) -> tuple[list[Snapshot], float]:
    """Remove channels of every expert one by one, and refit those that are left at each size.

    Args:
        experts: of the layer, float32, on the device to work on.
        statistics: what they read on the calibration text.
        sizes: numbers of channels that each keeps, falling.
        damping: lambda in H = G + lambda * mean(diag G) * I, and the least ridge of the refit.
        name: the site's, for people.

    Returns:
        One snapshot a size, with `channels_EK`, and `weight_OK` of shape E * D * K, or as the model has it; and the
        error of removing all.

    Raises:
        LinAlgError: if rounding leaves a Gram matrix no inverse.
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
    """The Gram matrix of what the output projection of one expert reads, gates and weights of tokens included."""
    gates_N = routed.gates_NE[:, expert]
    if int((gates_N > 0).sum()) < FEWEST_TOKENS:
        gates_N = routed.logits_NE.softmax(-1)[:, expert]
    rows = gates_N.nonzero()[:, 0]
    channels_NI = experts.channels(expert, routed.x_ND[rows]) * (gates_N[rows] * routed.weights_N[rows])[:, None]
    return channels_NI.T @ channels_NI / len(routed.x_ND)
