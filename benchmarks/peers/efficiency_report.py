"""Plot training curves as SVG, for light and dark mode, and tabulate them in Markdown.

Between two measurements, curves are interpolated linearly over the logarithm of tokens, and before the first over
tokens. A rival needs the tokens at which its curve first falls to the value of ours; if it never does, it needs more
than it was trained on.
"""

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from darwinlm.runtime.files import write_bytes

GRID = 8_192
OURS = "ours"
Rows = Sequence[Mapping[str, Any]]
_METRICS: dict[str, tuple[str, Callable[[Mapping[str, Any]], float | None]]] = {
    "kl_wikitext": ("KL on WikiText-2", lambda point: point["kl_wikitext"]),
    "kl_held_out": ("KL on held-out text", lambda point: point["kl_held_out"]),
    "zero_shot": (
        "Zero-shot error rate, mean of tasks",
        lambda point: 1 - point["zero_shot"]["mean"] if "zero_shot" in point else None,
    ),
}
"""Title and value of each metric; lower is better, None if a point lacks it."""
_ORDER = (OURS, "even", "wanda", "taylor", "flap", "slicegpt", "layers", "masks")


def read_rows(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return all rows in a folder, by file."""
    return {file: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}


@dataclass(frozen=True)
class Curve:
    """Mean curve of a method over seeds, at the points that all seeds have."""

    method: str
    name: str
    points: tuple[tuple[int, float], ...]
    """Tokens and value, ascending."""

    def at(self, tokens: float) -> float | None:
        """Return the value after `tokens`; None beyond the measurements."""
        for (before, high), (after, low) in pairwise(self.points):
            if before <= tokens <= after:
                return high + _part(before, after, tokens) * (low - high)
        known = [value for at, value in self.points if at == tokens]
        return known[0] if known else None

    def reaches(self, value: float) -> float | None:
        """Return the tokens after which it is first at most `value`; None if it never is."""
        if not self.points:
            return None
        first, start = self.points[0]
        if start <= value:
            return float(first)
        for (before, high), (after, low) in pairwise(self.points):
            if low <= value:
                part = (high - value) / (high - low)
                if before == 0:
                    return part * after
                return float(before * (after / before) ** part)
        return None

    @property
    def last(self) -> int:
        """Tokens of the last measurement."""
        return self.points[-1][0] if self.points else 0


def _part(before: float, after: float, tokens: float) -> float:
    """Return the relative position of `tokens` between two measurements."""
    if before == 0:
        return tokens / after
    return math.log(tokens / before) / math.log(after / before)


def curves(rows: Rows, metric: str, *, all_text: bool = False) -> list[Curve]:
    """Return the curves by method, in a fixed order; `all_text` counts all tokens that a method reads."""
    value_of = _METRICS[metric][1]
    found = []
    for method in sorted({row["method"] for row in rows} & set(_ORDER), key=_ORDER.index):
        same = [row for row in rows if row["method"] == method]
        seeds = []
        for row in same:
            extra = sum(count for name, count in row["text"].items() if name != "masks") if all_text else 0
            known = {point["tokens"] + extra: value_of(point) for point in row["points"]}
            seeds.append({tokens: value for tokens, value in known.items() if value is not None})
        common = sorted(set.intersection(*(set(one) for one in seeds)))
        points = tuple((tokens, sum(one[tokens] for one in seeds) / len(seeds)) for tokens in common)
        if points:
            found.append(Curve(method, same[0]["name"], points))
    return found


@dataclass(frozen=True)
class Need:
    """Tokens that a rival needs, as a multiple of ours."""

    times: float
    more: bool = False
    """Whether it needs more than that: the rival has not reached the value."""

    def __str__(self) -> str:
        shown = f"{self.times:.1f}" if self.times < 10 else f"{self.times:.0f}"
        return f"{'>' if self.more else ''}{shown}"


def need(rival: Curve, ours: Curve, tokens: float) -> Need | None:
    """Return what `rival` needs for the value of `ours` after `tokens`; None where ours was not measured."""
    value = ours.at(tokens)
    if value is None or tokens <= 0:
        return None
    reached = rival.reaches(value)
    return Need(rival.last / tokens, more=True) if reached is None else Need(reached / tokens)


def write_table(rows: Rows) -> str:
    """Return Markdown tables of the curves, and of the tokens that rivals need for the values of ours."""
    lines: list[str] = []
    for metric, (title, _) in _METRICS.items():
        found = curves(rows, metric)
        if not found:
            continue
        points = sorted({tokens for curve in found for tokens, _ in curve.points})
        lines += [f"{title}, by training tokens:", ""]
        lines += _markdown(
            ["method", *map(_tokens, points)],
            [[one.name, *(_value(dict(one.points).get(tokens)) for tokens in points)] for one in found],
        )
        lines += _needs(found, [tokens for tokens in points if tokens > 0], "training tokens")
    everything = curves(rows, "kl_wikitext", all_text=True)
    for one in everything:
        if one.method == OURS:
            lines += ["The same for all tokens read, including calibration and search:", ""]
            lines += _needs(everything, [tokens for tokens, _ in one.points], "tokens read")
    return "\n".join(lines).rstrip() + "\n"


def _needs(found: Sequence[Curve], points: Sequence[int], what: str) -> list[str]:
    ours = [one for one in found if one.method == OURS]
    rivals = [one for one in found if one.method != OURS]
    points = [tokens for tokens in points if ours and ours[0].at(tokens) is not None]
    if not rivals or not points:
        return []
    body = [
        [one.name, *("-" if (times := need(one, ours[0], tokens)) is None else f"{times}" for tokens in points)]
        for one in rivals
    ]
    lines = [f"Times the {what} of ours needed for the value of ours:", ""]
    return lines + _markdown(["method", *map(_tokens, points)], body)


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)] + [""]


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _tokens(count: float) -> str:
    return f"{round(count):,}"


# Plots. The style sheet has a color for each method; labels are next to the lines.

_STYLE = """
svg{--ink:#1f2933;--soft:#5d6b79;--grid:#dfe4ea;--paper:#ffffff;--ours:#00796b;
--a:#c2185b;--b:#b26a00;--c:#5e35b1;--d:#1565c0;--e:#6d4c41;--f:#9e2a2b;--g:#546e7a}
@media (prefers-color-scheme:dark){svg{--ink:#e6eaef;--soft:#a3afbc;--grid:#37414c;--paper:#1b2129;--ours:#4dd0b8;
--a:#f48fb1;--b:#ffb74d;--c:#b39ddb;--d:#90caf9;--e:#bcaaa4;--f:#ef9a9a;--g:#b0bec5}}
.paper{fill:var(--paper)}text{font:13px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--ink)}
.title{font-size:17px;font-weight:600}.soft{fill:var(--soft)}.strong{font-weight:600}.end{text-anchor:end}
.middle{text-anchor:middle}.grid{stroke:var(--grid);stroke-width:1}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.line.ours{stroke-width:4}
"""
_COLOURS = ("a", "b", "c", "d", "e", "f", "g")
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 800, 52, 206, 66, 46


def write_plots(rows: Rows, folder: Path) -> list[Path]:
    """Write both plots, KL over tokens and the tokens that rivals need, and return their files."""
    found = curves(rows, "kl_wikitext")
    if not any(one.method == OURS for one in found):
        raise SystemExit("there is no row of ours to plot")
    share = next(row["target"] for row in rows if "target" in row)
    model = rows[0]["model"]
    files = []
    for name, drawn in (
        ("data-efficiency.svg", curve_plot(found, model, share)),
        ("data-needed.svg", need_plot(found)),
    ):
        if drawn:
            write_bytes(folder / name, drawn.encode())
            files.append(folder / name)
    return files


def curve_plot(found: Sequence[Curve], model: str, share: float) -> str:
    """Plot KL over training tokens on logarithmic axes; untrained models are at the left, before a gap."""
    height = 460
    tokens = sorted({at for one in found for at, _ in one.points if at > 0})
    low, high = (tokens[0], tokens[-1]) if tokens else (GRID, 2 * GRID)
    values = [value for one in found for _, value in one.points]
    bottom, top = min(values) / 1.12, max(values) * 1.12
    left, right = _LEFT + 56, _WIDTH - _RIGHT

    def x_of(at: float) -> float:
        if at == 0:
            return _LEFT + 14
        return left + (right - left) * math.log(at / low) / max(math.log(high / low), 1e-9)

    def y_of(value: float) -> float:
        return _TOP + (height - _TOP - _BOTTOM) * math.log(top / value) / math.log(top / bottom)

    parts = [
        _text(_LEFT - 40, 26, f"{model} pruned to {share:.0%} of its parameters", "title"),
        _text(_LEFT - 40, 46, "KL to the dense model on WikiText-2: lower is better", "soft"),
    ]
    for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20):
        if bottom <= tick <= top:
            y = y_of(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(_text(_LEFT - 8, y + 4, f"{tick:g}", "soft end"))
    parts.append(_text(x_of(0), height - 22, "none", "soft middle"))
    for tick in tokens:
        if math.log2(tick / low) % 1 < 1e-6:
            parts.append(_text(x_of(tick), height - 22, _short(tick), "soft middle"))
    parts.append(_text((left + right) / 2, height - 4, "training tokens", "soft middle"))
    labels = []
    for one, color in zip(found, _colors(found), strict=True):
        places = [(x_of(at), y_of(value)) for at, value in one.points]
        parts.append(
            f'<polyline class="line{" ours" if one.method == OURS else ""}" stroke="var(--{color})" points="'
            + " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            + '"/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--{color})"/>' for x, y in places]
        labels.append((places[-1], f"{one.name} {one.points[-1][1]:.2f}", color, one.method == OURS))
    heights = apart([y for (_, y), *_ in labels], 17, _TOP, height - _BOTTOM)
    for ((x, y), label, color, strong), at in zip(labels, heights, strict=True):
        parts.append(
            f'<line x1="{x + 4:.1f}" y1="{y:.1f}" x2="{right + 12}" y2="{at:.1f}" stroke="var(--{color})" '
            'stroke-width="1" stroke-dasharray="1 3"/>'
        )
        parts.append(_text(right + 16, at + 4, label, "strong" if strong else "", f"var(--{color})"))
    return _svg(height, parts, "KL to the dense model over training tokens, by method")


def need_plot(found: Sequence[Curve]) -> str:
    """Plot bars of the tokens that each rival needs; empty if there is nothing to compare yet."""
    ours = next(one for one in found if one.method == OURS)
    rivals = [one for one in found if one.method != OURS]
    tokens = chosen_point(ours, rivals)
    if tokens is None:
        return ""
    colors = dict(zip((one.method for one in found), _colors(found), strict=True))
    bars = [(one, times) for one in rivals if (times := need(one, ours, tokens)) is not None]
    bars.sort(key=lambda bar: (bar[1].more, bar[1].times))
    height, step = _TOP + 34 * (len(bars) + 1) + 14, 34
    left, right = 214, _WIDTH - 150
    most = max(1.0, *(times.times for _, times in bars))

    def width(times: float) -> float:
        return (right - left) * times / most

    value = ours.at(tokens)
    parts = [
        _text(12, 26, f"Training tokens needed to match ours after {_short(tokens)} tokens", "title"),
        _text(12, 46, f"KL {value:.2f} to the dense model on WikiText-2; ours = 1", "soft"),
        _bar(left, _TOP, width(1.0), "ours", "ours", "1x", more=False, strong=True),
    ]
    for number, (one, times) in enumerate(bars, 1):
        shown = f"{times}x" + (", not reached" if times.more else "")
        at = _TOP + number * step
        parts.append(_bar(left, at, width(times.times), colors[one.method], one.name, shown, more=times.more))
    return _svg(height, parts, "Training tokens that each rival needs, as a multiple of ours")


def chosen_point(ours: Curve, rivals: Sequence[Curve]) -> int | None:
    """Return the tokens to compare at: where the most rivals reach the value of ours, and of those the last."""
    points = [at for at, _ in ours.points if at > 0]
    if not points or not rivals:
        return None

    def come(at: int) -> int:
        needs = [need(one, ours, at) for one in rivals]
        return sum(times is not None and not times.more for times in needs)

    return max(points, key=lambda at: (come(at), at if come(at) else -at))


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places as little as needed to be `gap` apart, in their order, and within the bounds if they fit."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = [0.0] * len(places)
    at = low - gap
    for index in order:
        at = moved[index] = max(places[index], at + gap)
    at = high + gap
    for index in reversed(order):
        at = moved[index] = min(moved[index], at - gap)
    return moved


def _bar(
    x: float, y: float, width: float, color: str, name: str, shown: str, *, more: bool, strong: bool = False
) -> str:
    fill = f'fill="var(--{color})"' + (' fill-opacity="0.35"' if more else "")
    kind = "strong" if strong else ""
    edge = f' stroke="var(--{color})" stroke-dasharray="4 3"' if more else ""
    return (
        _text(x - 10, y + 16, name, f"end {kind}")
        + f'<rect x="{x}" y="{y}" width="{max(width, 2):.1f}" height="22" rx="3" {fill}{edge}/>'
        + _text(x + width + 8, y + 16, shown, kind)
    )


def _colors(found: Sequence[Curve]) -> list[str]:
    others = [method for method in _ORDER if method != OURS]
    return [OURS if one.method == OURS else _COLOURS[others.index(one.method)] for one in found]


def _short(tokens: float) -> str:
    return f"{tokens / 1024:g}K" if tokens >= 1024 else f"{tokens:g}"


def _text(x: float, y: float, text: str, kind: str = "", fill: str = "") -> str:
    style = f' style="fill:{fill}"' if fill else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind.strip()}"{style}>{html.escape(text)}</text>'


def _svg(height: int, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img" '
        f'aria-label="{html.escape(label)}"><style>{_STYLE}</style>'
        f'<rect class="paper" width="{_WIDTH}" height="{height}" rx="8"/>' + "\n".join(parts) + "</svg>\n"
    )
