"""Tests of the forecast of the final loss."""

import random

import pytest

from darwinlm.recovery.forecast import forecast


@pytest.mark.parametrize("exponent", [0.1, 0.3, 0.7])
def test_forecast_of_power_law(exponent):
    rng = random.Random(0)
    losses = [2.0 + 3.0 * step**-exponent + rng.gauss(0, 0.02) for step in range(1, 2001)]
    expected = 2.0 + 3.0 * 2000**-exponent
    assert forecast(losses[:200], 2000) == pytest.approx(expected, abs=0.15 * (losses[199] - 2))
    assert forecast(losses[:1000], 2000) == pytest.approx(expected, abs=0.03)
    rising = [1.0 + 0.001 * step for step in range(100)]
    assert forecast(rising, 1000) == pytest.approx(sum(rising[-16:]) / 16, abs=0.03)
