"""Paired comparison of two models on the same items: accuracies, their difference, and its significance."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any


def accuracy(items: Sequence[float]) -> dict[str, float]:
    """Return the mean of `items` (1 correct, 0 wrong) and its standard error, `sd / sqrt(n)` with n - 1 in the
    variance."""
    return {"accuracy": math.fsum(items) / len(items), "stderr": _standard_error(items)}


def paired(items: Sequence[float], dense: Sequence[float]) -> dict[str, Any]:
    """Compare a model with the dense model on the same items.

    Args:
        items: results of the model, 1 correct and 0 wrong.
        dense: results of the dense model, in the same order.

    Returns:
        `difference` of the accuracies and `difference_stderr`, both from differences per item; `only_this` and
        `only_dense`, the numbers of items that only one model gets right; `p`, the p-value of `mcnemar`.
    """
    differences = [one - other for one, other in zip(items, dense, strict=True)]
    only_this, only_dense = (sum(sign * d > 0 for d in differences) for sign in (1, -1))
    return {
        "difference": math.fsum(differences) / len(differences),
        "difference_stderr": _standard_error(differences),
        "only_this": only_this,
        "only_dense": only_dense,
        "p": mcnemar(only_this, only_dense),
    }


def mcnemar(ones: int, others: int) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947).

    If both models were equally good, each item that only one gets right would be a fair coin toss: this is the
    probability that `ones + others` tosses come out at least as unevenly as `ones` to `others`.
    """
    tosses, fewer = ones + others, min(ones, others)
    ways = sum(math.comb(tosses, heads) for heads in range(fewer + 1))
    # Integers of any length: their quotient is exact where floats would underflow.
    return min(1.0, float(Fraction(2 * ways, 2**tosses)))


def mean_of_tasks(tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean over tasks with equal weights, by model; `p` is computed from the items of all tasks.

    Args:
        tasks: tasks with `models`: by name, the results of `accuracy` and (except for `dense`) `paired`.
    """
    found: dict[str, Any] = {}
    for name in tasks[0]["models"]:
        each = [task["models"][name] for task in tasks]
        means = {
            key: math.fsum(one[key] for one in each) / len(each) for key in ("accuracy", "difference") if key in each[0]
        }
        for key, error in (("accuracy", "stderr"), ("difference", "difference_stderr")):
            if key in means:
                means[error] = math.sqrt(math.fsum(one[error] ** 2 for one in each)) / len(each)
        if "p" in each[0]:
            counts = {key: sum(one[key] for one in each) for key in ("only_this", "only_dense")}
            means |= {**counts, "p": mcnemar(*counts.values())}
        found[name] = means
    return found


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
