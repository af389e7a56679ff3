"""Charts as inline SVG. Positions are percentages, so that a chart fills any width and its text keeps its size.

All text arguments are escaped. The tooltip of a mark is its `<title>`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

_TICKS = 4
_NARROW = 40
"""Number of columns above which outlines have no border on small screens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """Column of `columns`: the remaining part, within an outline of the whole."""

    share: float
    """Share of the outline's height, 0 to 1."""
    title: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Point of a `curve`, with a tooltip."""

    x: float
    y: float | None
    """Value; None leaves a gap."""
    others: Sequence[float] = ()
    """Further values at this position, drawn as faint dots."""
    low: float | None = None
    high: float | None = None
    """Limits of the band, if there is one."""
    strong: bool = False
    """Whether the dot is filled."""
    title: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Line of a `curve`, in a color class of the style sheet."""

    points: Sequence[Point]
    color: str
    dots: bool = True
    """Whether all points have a dot; strong points always have one."""


def columns(values: Sequence[Column], *, color: str, label: str, height: int) -> Markup:
    """Draw one column for each of `values`, with outlines of equal height and some column numbers, from 0, below."""
    step = 100 / max(len(values), 1)
    gap = min(step * 0.22, 1.2)
    narrow = " narrow" if len(values) > _NARROW else ""
    marks = []
    for index, value in enumerate(values):
        x, width, filled = _percent(index * step + gap / 2), _percent(step - gap), value.share * 100
        marks.append(
            Markup(
                '<g class="mark"><title>{}</title><rect class="outline{}" x="{}" y="0" width="{}" height="100%"/>'
                '<rect class="fill {}" x="{}" y="{}" width="{}" height="{}"/></g>'
            ).format(value.title, narrow, x, width, color, x, _percent(100 - filled), width, _percent(filled))
        )
    every = next(every for every in (1, 2, 5, 10, 20, 50, 100, 1000) if len(values) / every <= 8)
    ticks = [(float(index), (index + 0.5) * step) for index in range(0, len(values), every)]
    return _frame(Markup("").join(marks), label=label, height=height, x_ticks=ticks, y_ticks=[])


def curve(series: Sequence[Series], *, label: str, height: int, from_zero: bool = False) -> Markup:
    """Draw lines over common axes; `from_zero` starts the vertical axis at 0."""
    points = [point for one in series for point in one.points]
    xs = [point.x for point in points]
    ys = [
        value for p in points for value in (p.y, p.low, p.high, *p.others) if value is not None and math.isfinite(value)
    ]
    if not ys:
        return Markup("")
    x_low, x_high = _apart(min(xs), max(xs))
    y_ticks = nice_ticks(0.0 if from_zero else min(ys), max(ys))
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def x_of(value: float) -> float:
        return 100 * (value - x_low) / (x_high - x_low)

    def y_of(value: float) -> float:
        return 100 * (y_high - value) / (y_high - y_low)

    grid = [
        Markup('<line class="grid" x1="0" x2="100%" y1="{0}" y2="{0}"/>').format(_percent(y_of(t))) for t in y_ticks
    ]
    marks = Markup("").join([*grid, *(_line(one, x_of, y_of) for one in series)])
    hits = _hits([(x_of(point.x), point.title) for point in points])
    x_ticks = [(tick, x_of(tick)) for tick in nice_ticks(x_low, x_high, whole=True) if x_low <= tick <= x_high]
    return _frame(
        marks + hits, label=label, height=height, x_ticks=x_ticks, y_ticks=[(tick, y_of(tick)) for tick in y_ticks]
    )


def nice_ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return round numbers from at most `low` to at least `high`; with `whole`, integers."""
    low, high = _apart(low, high)
    raw = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _apart(low: float, high: float) -> tuple[float, float]:
    """Return `low` and `high`, moved apart if they are equal."""
    if high - low > 1e-12 * max(abs(low), abs(high), 1e-300):
        return low, high
    return (low - 0.5, high + 0.5) if low else (0.0, 1.0)


def _line(series: Series, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> Markup:
    drawn = [point for point in series.points if point.y is not None]
    places = [(x_of(point.x), y_of(point.y)) for point in drawn if point.y is not None]
    shapes = Markup("")
    band = [(x_of(p.x), y_of(p.low), y_of(p.high)) for p in drawn if p.low is not None and p.high is not None]
    if band:
        around = [(x, top) for x, _, top in band] + [(x, bottom) for x, bottom, _ in reversed(band)]
        shapes += Markup('<polygon class="band" points="{}"/>').format(_points(around))
    if len(places) > 1:
        shapes += Markup('<polyline points="{}"/>').format(_points(places))
    marks = Markup('<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%">{}</svg>').format(
        shapes
    )
    for point in series.points:
        for other in point.others:
            marks += _dot("other", x_of(point.x), y_of(other), 3)
    for point, (x, y) in zip(drawn, places, strict=True):
        if series.dots or point.strong:
            marks += _dot("dot strong" if point.strong else "dot", x, y, 4.5 if series.dots else 3)
    return Markup('<g class="series {}">{}</g>').format(series.color, marks)


def _dot(name: str, x: float, y: float, radius: float) -> Markup:
    return Markup('<circle class="{}" cx="{}" cy="{}" r="{}"/>').format(name, _percent(x), _percent(y), radius)


def _hits(places: Sequence[tuple[float, str]]) -> Markup:
    """Draw hover strips up to halfway between neighbors; points less than a percent apart share a strip."""
    strips: list[tuple[float, list[str]]] = []
    for x, title in sorted(places, key=lambda place: place[0]):
        if strips and x - strips[-1][0] < 1:
            strips[-1][1].append(title)
        else:
            strips.append((x, [title]))
    edges = [0.0, *((a[0] + b[0]) / 2 for a, b in pairwise(strips)), 100.0]
    return Markup("").join(
        Markup(
            '<g class="hit"><title>{}</title><rect x="{}" y="0" width="{}" height="100%"/>'
            '<line x1="{}" x2="{}" y1="0" y2="100%"/></g>'
        ).format("\n".join(titles), _percent(left), _percent(right - left), _percent(x), _percent(x))
        for (x, titles), left, right in zip(strips, edges, edges[1:], strict=False)
    )


def _frame(
    marks: Markup,
    *,
    label: str,
    height: int,
    x_ticks: Sequence[tuple[float, float]],
    y_ticks: Sequence[tuple[float, float]],
) -> Markup:
    """Add axes to `marks`: ticks are numbers with their positions in percent."""

    def axis(side: str, edge: str, ticks: Sequence[tuple[float, float]]) -> Markup:
        spans = (Markup('<span style="{}:{}">{}</span>').format(edge, _percent(at), _tick(tick)) for tick, at in ticks)
        return Markup('<div class="{}" aria-hidden="true">{}</div>').format(side, Markup("").join(spans))

    return Markup(
        '<div class="chart{}" style="--height:{}px">{}<svg class="plot" role="img" aria-label="{}">{}</svg>{}</div>'
    ).format(
        " bare" if not y_ticks else "",
        height,
        axis("y", "top", y_ticks),
        label,
        marks,
        axis("x", "left", x_ticks),
    )


def _tick(value: float) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / {'B': 1e9, 'M': 1e6, 'k': 1e3}[letter]:g}{letter}"
    return f"{value:g}"


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in places)


def _percent(value: float) -> str:
    return f"{round(value, 3):g}%"
