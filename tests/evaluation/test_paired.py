"""Tests of paired comparisons against enumeration and plain statistics."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwinlm.evaluation.paired import accuracy, mcnemar, mean_of_tasks, paired

RIGHT = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=60)


@pytest.mark.parametrize(("ones", "others"), list(itertools.product(range(6), repeat=2)))
def test_mcnemar_matches_enumeration(ones, others):
    tosses = list(itertools.product((0, 1), repeat=ones + others))
    uneven = [abs(2 * sum(toss) - len(toss)) >= abs(ones - others) for toss in tosses]
    assert mcnemar(ones, others) == pytest.approx(sum(uneven) / len(tosses))


def test_mcnemar_near_normal_approximation():
    z = (2_600 - 2_400 - 1) / math.sqrt(5_000)
    assert mcnemar(2_400, 2_600) == mcnemar(2_600, 2_400) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert mcnemar(0, 5_000) == 0.0


@given(RIGHT)
def test_paired_matches_differences(items):
    ones, others = ([float(pair[side]) for pair in items] for side in (0, 1))
    found, differences = paired(ones, others), np.subtract(ones, others)
    assert found["difference"] == pytest.approx(differences.mean(), abs=1e-12)
    assert found["difference_stderr"] == pytest.approx(differences.std(ddof=1) / math.sqrt(len(items)), abs=1e-9)
    assert found["only_this"] - found["only_dense"] == pytest.approx(differences.sum())
    alone = accuracy(ones)
    assert alone["accuracy"] == pytest.approx(np.mean(ones))
    assert alone["stderr"] == pytest.approx(np.std(ones, ddof=1) / math.sqrt(len(ones)), abs=1e-9)


def test_mean_of_tasks():
    def entry(ones, others):
        return {"models": {"dense": accuracy(others), "pruned": accuracy(ones) | paired(ones, others)}}

    few, many = entry([0.0, 0.0, 1.0], [1.0, 1.0, 1.0]), entry([1.0] * 90 + [0.0] * 10, [1.0] * 95 + [0.0] * 5)
    mean = mean_of_tasks([few, many])
    assert mean["dense"]["accuracy"] == pytest.approx((1 + 0.95) / 2)
    assert mean["pruned"]["difference"] == pytest.approx((-2 / 3 - 0.05) / 2)
    assert mean["pruned"]["p"] == mcnemar(0, 7)
    errors = [one["models"]["pruned"]["difference_stderr"] for one in (few, many)]
    assert mean["pruned"]["difference_stderr"] == pytest.approx(math.hypot(*errors) / 2)
    assert "p" not in mean["dense"]
