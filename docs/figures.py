"""Draw the picture of the README: quality against size, from the tables of comparison.md, and the sizes a search found.

    python docs/figures.py RUN

RUN is a finished run. The picture has no script and no font of its own, and follows the reader's light or dark mode.
"""

import argparse
import html
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parent
WIDTH, HEIGHT = 880, 330
TOP, BOTTOM = 64, 290
LEFT, RIGHT = 46, 268
LAYERS_LEFT, LAYERS_RIGHT = 520, 868
HIGHEST = 3.2
LABELS = {
    "ours": "DarwinLM",
    "even widths, second order": "even widths, second order",
    "Torch-Pruning, Taylor": "Torch-Pruning (Taylor)",
    "even widths, activations x weights": "even widths, Wanda-like",
    "whole layers, block influence": "whole layers (ShortGPT)",
}
"""Rows of the tables by how their names begin; what has a KL above 5 is left to the page."""
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #57606a }
.title { font-size: 14px; font-weight: 600; fill: #1f2328 }
.ours { fill: #0969da; font-weight: 600 }
line { stroke: #d0d7de }
polyline { fill: none; stroke: #8c959f; stroke-width: 1.5 }
circle { fill: #8c959f }
.line-ours { stroke: #0969da; stroke-width: 2.5 }
.dot-ours { fill: #0969da }
.whole { fill: #eaeef2 }
.attention { fill: #8250df }
.mlp { fill: #1a7f37 }
@media (prefers-color-scheme: dark) {
  text { fill: #9198a1 }
  .title { fill: #f0f6fc }
  .ours { fill: #4493f8 }
  line { stroke: #3d444d }
  .line-ours { stroke: #4493f8 }
  .dot-ours { fill: #4493f8 }
  .whole { fill: #2a313c }
  .attention { fill: #ab7df8 }
  .mlp { fill: #3fb950 }
}
"""


def main() -> None:
    """Write `images/overview.svg`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    plan = json.loads((run / "model" / "plan.json").read_text())
    page = (DOCS / "comparison.md").read_text()
    parts = [*quality(page), *sizes(plan)]
    summary = "KL to the dense model against size for five methods, and the sizes of all layers found at 60%"
    (DOCS / "images").mkdir(exist_ok=True)
    (DOCS / "images" / "overview.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{summary}">'
        f"<style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def recovered(page: str, size: str) -> dict[str, float]:
    """By label, the KL after recovery in the page's table for a size."""
    rows = page.split(f"## At {size} of all parameters")[1].split("\n## ")[0].splitlines()
    found = {}
    for row in rows:
        cells = [cell.strip().strip("*") for cell in row.strip("|").split("|")]
        for start, label in LABELS.items():
            if cells[0].startswith(start):
                found[label] = float(re.findall(r"[\d.]+", cells[4])[0])
    return found


def quality(page: str) -> Iterator[str]:
    """Lines from the dense model to 60%, lower is better."""
    middle, small = recovered(page, "0.8"), recovered(page, "0.6")
    yield text(0, 18, "KL to the dense model, after the same recovery", "title")
    yield text(0, 36, "SmolLM2-135M on WikiText-2; lower is better")
    for value in (0, 1, 2, 3):
        yield f'<line x1="{LEFT}" x2="{RIGHT}" y1="{height(value)}" y2="{height(value)}"/>'
        yield text(LEFT - 8, height(value) + 4, str(value), anchor="end")
    places = [LEFT, (LEFT + RIGHT) / 2, RIGHT]
    for x, share in zip(places, ("100%", "80%", "60%"), strict=True):
        yield text(x, BOTTOM + 18, share, anchor="middle")
    yield text((LEFT + RIGHT) / 2, BOTTOM + 36, "of the parameters", anchor="middle")
    labels = spread([height(small[label]) for label in small])
    for (label, last), y in zip(small.items(), labels, strict=True):
        ours = label == "DarwinLM"
        values = zip(places, (0, middle[label], last), strict=True)
        points = [(x, height(value)) for x, value in values]
        shape = " ".join(f"{x:.1f},{at:.1f}" for x, at in points)
        yield f'<polyline points="{shape}" class="{"line-ours" if ours else ""}"/>'
        for x, at in points[1:]:
            yield f'<circle cx="{x:.1f}" cy="{at:.1f}" r="{4 if ours else 3}" class="{"dot-ours" if ours else ""}"/>'
        yield text(RIGHT + 10, y + 4, f"{label} {last:.2f}", "ours" if ours else "")


def sizes(plan: dict[str, dict[str, int]]) -> Iterator[str]:
    """What is left of every attention and every MLP."""
    yield text(LAYERS_LEFT, 18, "What the search keeps of each layer at 60%", "title")
    yield text(LAYERS_LEFT, 36, "filled: kept; outline: the dense model")
    middle = (TOP + BOTTOM) / 2
    for kind, label, top, bottom in (
        ("attention", "attention heads", TOP + 4, middle - 16), ("mlp", "MLP channels", middle + 16, BOTTOM),
    ):  # fmt: skip
        units = [count for name, count in plan["units"].items() if name.endswith(kind)]
        step = (LAYERS_RIGHT - LAYERS_LEFT) / len(units)
        yield text(LAYERS_LEFT, top - 6, label)
        for number, count in enumerate(units):
            x, filled = LAYERS_LEFT + number * step, (bottom - top) * count / max(units)
            yield box(x, top, step - 2, bottom - top, "whole")
            yield box(x, bottom - filled, step - 2, filled, kind)
    yield text(LAYERS_LEFT, BOTTOM + 18, "first layer")
    yield text(LAYERS_RIGHT, BOTTOM + 18, "last", anchor="end")


def height(value: float) -> float:
    """The place of a KL, in pixels from the top."""
    return round(BOTTOM - (BOTTOM - TOP) * value / HIGHEST, 1)


def spread(places: Sequence[float], apart: float = 15) -> list[float]:
    """Places of labels that lie below one another in this order from the bottom up, moved until none overlap."""
    order = sorted(range(len(places)), key=lambda index: -places[index])
    moved = list(places)
    for before, index in itertools.pairwise(order):
        moved[index] = min(moved[index], moved[before] - apart)
    return moved


def text(x: float, y: float, content: str, name: str = "", anchor: str = "start") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{name}">{html.escape(content)}</text>'


def box(x: float, y: float, width: float, tall: float, name: str) -> str:
    """A bar."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{tall:.1f}" class="{name}"/>'


if __name__ == "__main__":
    main()
