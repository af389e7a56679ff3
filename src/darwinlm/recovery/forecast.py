"""From the first losses of a training, what its loss will be at the end: a power law, fitted while it runs."""

import itertools
from collections.abc import Sequence

import numpy as np

FRACTIONS = (0.1, 0.25, 0.5)
"""Of the steps, when a forecast is made."""
_BINS = 12
_EXPONENTS = np.arange(0.05, 1.01, 0.05)


def forecast(losses: Sequence[float], steps: int) -> float:
    """The loss expected after `steps` steps if the first `losses` go on as `a + b * step**-c`, with b and c positive.

    The losses are averaged in bins even in the logarithm of the step, so that the many late ones do not drown the early
    ones; the first twentieth, where the learning rate rises, is left out. How far it errs: docs/lab-log.md.
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
