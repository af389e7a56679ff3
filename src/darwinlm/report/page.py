"""The report: one page that opens without a network, made of `metrics.json` alone."""

import base64
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from darwinlm.files import write_bytes
from darwinlm.report.charts import Column, Point, Series, columns, curve
from darwinlm.report.facts import collect

_TEMPLATES = "templates"
_WATCH_SECONDS = 2.0


def write_report(run: Path, *, refresh: bool = False) -> dict[str, Any]:
    """Write `report/metrics.json` and `report/index.html` of the run in the folder `run`, finished or not.

    Files that would not change are left alone.

    Args:
        run: the run directory.
        refresh: whether the page loads itself again every few seconds while the run is unfinished.

    Returns:
        What `metrics.json` holds.

    Raises:
        UserError: if `run` is no run, a file in it is damaged, or the report cannot be written.
    """
    metrics = collect(run)
    page = render(metrics, refresh=refresh and not metrics["finished"])
    as_json = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
    for name, text in (("metrics.json", as_json), ("index.html", page)):
        file, content = run / "report" / name, text.encode()
        if not file.is_file() or file.read_bytes() != content:
            write_bytes(file, content)
    return metrics


def watch_report(run: Path, wait: Callable[[], None] = lambda: time.sleep(_WATCH_SECONDS)) -> dict[str, Any]:
    """Write the report of the run in the folder `run` again and again until it is finished, or until interrupted.

    Raises:
        UserError: as `write_report`.
    """
    try:
        while not (metrics := write_report(run, refresh=True))["finished"]:
            wait()
    except KeyboardInterrupt:
        write_report(run)
        raise
    return metrics


def render(metrics: Mapping[str, Any], *, refresh: bool = False) -> str:
    """The page for what `facts.collect` gives. All text in it is escaped, and no script but the page's own can run."""
    scripts = [_read("page.js"), *([_read("refresh.js")] if refresh else [])]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            metrics=metrics,
            sizes=metrics.get("sizes") or {metrics["target"]: metrics},
            family="sizes" in metrics,
            recipe_yaml=yaml.safe_dump(metrics["recipe"], sort_keys=False),
            # Both are files of this package, not text of anybody else.
            style=Markup(_read("page.css")),
            scripts=[Markup(script) for script in scripts],
            script_hashes=hashes,
        )
    )


def _read(name: str) -> str:
    return (resources.files("darwinlm.report") / _TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("darwinlm.report", _TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count,
        "short": short,
        "percent": percent,
        "kl": kl,
        "plain": plain,
        "fixed": fixed,
        "signed": signed,
        "signed_percent": signed_percent,
        "probability": probability,
        "times": times,
        "duration": duration,
        "memory": memory,
        "model_name": model_name,
    }
    environment.globals |= {
        "kl": kl,
        "plain": plain,
        "layer_charts": layer_charts,
        "descent_chart": descent_chart,
        "generations_chart": generations_chart,
        "recovery_chart": recovery_chart,
        "family_chart": family_chart,
        "task_colour": task_colour,
        "task_key": task_key,
    }
    return environment


# ---- numbers as text


def count(value: int) -> str:
    """1,234,567"""
    return f"{value:,}"


def short(value: float) -> str:
    """134.5M"""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:.1f}{letter}"
    return f"{value:,}"


def percent(share: float) -> str:
    """59.9%"""
    return f"{100 * share:.1f}%"


def kl(nats: float | None) -> str:
    """0.876, small ones with more digits"""
    if nats is None:
        return "none"
    return f"{nats:.3f}" if abs(nats) >= 0.1 or nats == 0 else f"{nats:.5f}"


def plain(value: float) -> str:
    """1,953 and 41.1"""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def fixed(value: float) -> str:
    """2.345"""
    return f"{value:.3f}"


def signed(value: float) -> str:
    """+0.82"""
    return f"{value:+.2f}"


def signed_percent(share: float) -> str:
    """-4.5%"""
    return f"{100 * share:+.1f}%"


def probability(p: float) -> str:
    """0.031, 4.2e-07"""
    return f"{p:.2g}"


def times(factor: float) -> str:
    """1.66 and a sign of multiplication"""
    return f"{factor:.2f}\N{MULTIPLICATION SIGN}"


def duration(seconds: float) -> str:
    """41.2 s, 5.3 min, 7.9 h"""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"


def memory(count_of_bytes: int) -> str:
    """1.3 GiB"""
    for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count_of_bytes >= 1024**power:
            return f"{count_of_bytes / 1024**power:.1f} {name}"
    return f"{count_of_bytes} bytes"


def model_name(model: str) -> str:
    """A Hub id as it is, of a path its last part."""
    return model if model.count("/") == 1 and not model.startswith((".", "/")) else model.rstrip("/").split("/")[-1]


def task_colour(model: str) -> str:
    """The colour class of a model in the chart of tasks."""
    return model if model == "dense" else "recovered"


def task_key(models: Sequence[str]) -> list[tuple[str, str]]:
    """The legend of the chart of tasks."""
    return [(task_colour(name), name) for name in models]


# ---- charts


def layer_charts(layers: Sequence[Mapping[str, Any]], attention_unit: str) -> dict[str, Markup]:
    """By kind of site, one column a layer: what is left, in the outline of the dense size."""
    charts = {}
    for kind, unit, height in (("attention", attention_unit, 96), ("mlp", "channels", 150)):
        values = [
            Column(
                share=layer[kind]["share"],
                title=f"layer {layer['layer']}: {layer[kind]['kept']:,} of {layer[kind]['dense']:,} {unit}\n"
                f"{short(layer[kind]['parameters'])} parameters",
            )
            for layer in layers
        ]
        name = "attention" if kind == "attention" else "MLP"
        charts[kind] = columns(values, colour=kind, height=height, label=f"Size of each layer's {name}")
    return charts


def descent_chart(search: Mapping[str, Any]) -> Markup:
    """KL of the plan that each round of the descent begins and ends with, and of all that it judged."""
    rounds = search["descent"]
    begin = Point(x=0, y=rounds[0]["before"], title=f"start: KL {kl(rounds[0]['before'])}")
    points = [
        Point(
            x=one["round"],
            y=one["kl"],
            others=one["compared"],
            strong=one["improved"],
            title=f"round {one['round']}: KL {kl(one['kl'])}\n"
            + (
                f"{one['changed']['attention']} attention and {one['changed']['mlp']} MLP sites changed"
                if one["improved"]
                else "no proposed plan was better"
            ),
        )
        for one in rounds
    ]
    series = Series(points=[begin, *points], colour="found")
    return curve([series], label="KL by round of the descent", height=220)


def generations_chart(search: Mapping[str, Any]) -> Markup:
    """KL after a trial: the best of each generation, and all that reached its last step."""
    generations = search["generations"]
    points = [
        Point(
            x=one["generation"],
            y=one["kl"],
            others=one["compared"],
            strong=one["improved"],
            title=f"generation {one['generation']}: KL {kl(one['kl'])}\n"
            + f"{one['plans']} plans in the last step, up to {kl(one['worst'])}"
            + (f"\n{one['diverged']} diverged" if one["diverged"] else "")
            + (
                f"\nmoved: {one['changed']['attention']} attention, {one['changed']['mlp']} MLP sites"
                if any(one["changed"].values())
                else ""
            ),
        )
        for one in generations
    ]
    series = Series(points=points, colour="found", dots=len(points) <= 60)
    return curve([series], label="KL by generation", height=220)


def recovery_chart(recovery: Mapping[str, Any]) -> Markup:
    """The training loss by step, as means over stretches where there are many steps."""
    points = [
        Point(
            x=(one["first"] + one["last"]) / 2,
            y=one["loss"],
            low=one["low"],
            high=one["high"],
            title=f"step {one['first']:,}: loss {one['loss']:.3f}"
            if one["first"] == one["last"]
            else f"steps {one['first']:,} to {one['last']:,}: loss {one['loss']:.3f}\n"
            f"{one['low']:.3f} to {one['high']:.3f}",
        )
        for one in recovery["curve"]
    ]
    return curve([Series(points=points, colour="recovered", dots=False)], label="Training loss by step", height=220)


def family_chart(sizes: Mapping[str, Mapping[str, Any]]) -> Markup:
    """KL by parameters: a line for each kind of plan through all sizes that have been measured."""
    lines = []
    for kind in ("uniform", "found", "recovered"):
        rows = [(name, row) for name, facts in sizes.items() for row in facts.get("rows", []) if row["name"] == kind]
        points = [
            Point(
                x=100 * row["of_dense"]["parameters"],
                y=row["kl"],
                strong=True,
                title=f"{kind} at {percent(row['of_dense']['parameters'])} of the parameters: KL {kl(row['kl'])}, "
                f"perplexity {plain(row['perplexity'])}",
            )
            for _, row in sorted(rows, key=lambda pair: -pair[1]["parameters"])
        ]
        if points:
            lines.append(Series(points=points, colour=kind))
    return curve(lines, label="KL by percentage of parameters", height=260, from_zero=True)
