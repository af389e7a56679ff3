"""Tests of rank correlations."""

import pytest

from darwinlm.search.forecast import spearman


@pytest.mark.parametrize(
    ("ones", "others", "rho"),
    [
        ([1, 2, 3, 4, 5], [10, 20, 30, 40, 50], 1.0),
        ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),
        # Ties get their mean rank: 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
        ([0.1, 0.7, 0.7, 0.9], [1, 2, 3, 4], 4.5 / (4.5 * 5) ** 0.5),
        ([3, 3, 3, 3], [1, 2, 3, 4], 0.0),
    ],
)
def test_spearman(ones, others, rho):
    found = spearman(ones, others)
    assert found.rho == pytest.approx(rho)
    assert -1 <= found.low <= found.rho + 1e-5 and found.rho - 1e-5 <= found.high <= 1


def test_spearman_interval_narrows_with_more_plans():
    def width(count):
        found = spearman(range(count), [x ^ 1 for x in range(count)])
        return found.high - found.low

    assert width(3) == 2 and width(6) > width(12) > width(40)
