"""Forecast of the final training loss from the first losses, by fitting a power law."""

import itertools
from collections.abc import Sequence

import numpy as np

FRACTIONS = (0.1, 0.25, 0.5)
"""Fractions of the steps at which a forecast is made."""
_BINS = 12
_EXPONENTS = np.arange(0.05, 1.01, 0.05)


def forecast(losses: Sequence[float], steps: int) -> float:
    """Predict the loss after `steps` steps by fitting `a + b * step**-c`, with b and c positive, to the first `losses`.

    Losses are averaged in bins of equal size in log(step), so that the many late ones do not dominate; the first
    twentieth (warm-up) is ignored. For the accuracy see docs/lab-log.md.
    """
    first = max(1, len(losses) // 20)
    edges = np.unique(np.geomspace(first, len(losses), _BINS + 1).round().astype(int))
    bins = list(itertools.pairwise(edges))
    times = np.array([np.sqrt((start + 1) * end) for start, end in bins])
    means = np.array([np.mean(losses[start:end]) for start, end in bins])
    weights = np.sqrt([end - start for start, end in bins])
    best, expected = np.inf, float(means[-1])
    for exponent in _EXPONENTS:
        shape = times**-exponent
        (floor, height), *_ = np.linalg.lstsq(np.stack([weights, weights * shape], 1), weights * means, rcond=None)
        error = float(np.square(weights * (floor + height * shape - means)).sum())
        if height > 0 and error < best:
            best, expected = error, float(floor + height * steps**-exponent)
    return expected
