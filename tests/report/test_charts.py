"""Tests of charts: ticks, and columns and curves to scale."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import Page

from darwinlm.report.charts import Column, Point, Series, columns, curve, nice_ticks


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9), st.booleans())
def test_nice_ticks(a, b, whole):
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high, whole=whole)
    assert 2 <= len(ticks) <= 8
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step and ticks[-1] >= high - 1e-6 * step
    for one, other in pairwise(ticks):
        assert other - one == pytest.approx(step)
    if whole:
        assert all(tick == round(tick) for tick in ticks)


def test_columns_to_scale():
    shares = [1.0, 0.25, 0.0]
    chart = columns([Column(share=share, title="") for share in shares], color="mlp", label="", height=100)
    fills = [a for tag, a in Page(str(chart)).tags if tag == "rect" and a["class"].startswith("fill")]
    assert [float(fill["height"][:-1]) for fill in fills] == [100, 25, 0]
    assert [float(fill["y"][:-1]) for fill in fills] == [0, 75, 100]


def test_curve_to_scale():
    points = [Point(x=x, y=y, title=f"at {x}") for x, y in ((0, 1.0), (1, 3.0), (4, 2.0))]
    chart = str(curve([Series(points=points, color="found")], label="", height=100))
    dots = [a for tag, a in Page(chart).tags if tag == "circle"]
    assert [float(dot["cx"][:-1]) for dot in dots] == [0, 25, 100]
    assert [float(dot["cy"][:-1]) for dot in dots] == [100, 0, 50]
    assert curve([Series(points=[Point(x=0, y=None, title="")], color="found")], label="", height=100) == ""
