"""Rank correlation between the cheap scores and a longer training, for the user's own model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class RankCorrelation:
    """Spearman's rho with its 95% confidence interval."""

    rho: float
    low: float
    high: float


def spearman(ones: Sequence[float], others: Sequence[float]) -> RankCorrelation:
    """Compute the rank correlation of two scores of the same items; ties share their mean rank.

    The interval is Fisher's, with the variance 1.06 / (n - 3) of ranks (Fieller, Hartley and Pearson, 1957); with fewer
    than four items it is -1 to 1.
    """
    ranks = [_ranks(values) for values in (ones, others)]
    centre = (len(ones) - 1) / 2
    centred = [[rank - centre for rank in one] for one in ranks]
    norms = [math.sqrt(sum(value * value for value in one)) for one in centred]
    if min(norms) == 0:
        return RankCorrelation(0.0, -1.0, 1.0)
    rho = sum(a * b for a, b in zip(*centred, strict=True)) / (norms[0] * norms[1])
    rho = max(-1.0, min(1.0, rho))
    if len(ones) < 4:
        return RankCorrelation(rho, -1.0, 1.0)
    # A perfect correlation has no finite transform, so it is clipped to slightly below one.
    z, spread = math.atanh(max(-1 + 1e-6, min(1 - 1e-6, rho))), _NORMAL_95 * math.sqrt(1.06 / (len(ones) - 3))
    return RankCorrelation(rho, math.tanh(z - spread), math.tanh(z + spread))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda index: values[index])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for position in range(start, end + 1):
            ranks[order[position]] = (start + end) / 2
        start = end + 1
    return ranks
