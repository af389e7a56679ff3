"""Charts of the report, drawn from `metrics.json`."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from darwinlm.report.charts import Column, Point, Series, columns, curve
from darwinlm.report.numbers import kl, percent, plain, short


def task_color(model: str) -> str:
    """Return the color class of a model in the chart of tasks."""
    return model if model == "dense" else "recovered"


def task_key(models: Sequence[str]) -> list[tuple[str, str]]:
    """Return the legend of the chart of tasks."""
    return [(task_color(name), name) for name in models]


def layer_charts(layers: Sequence[Mapping[str, Any]], attention_unit: str) -> dict[str, Markup]:
    """Draw one column per layer, for each kind of site: the remaining part, in the outline of the dense size."""
    charts = {}
    for kind, height in (("attention", 96), ("mlp", 150)):
        values = [
            Column(
                share=layer[kind]["share"],
                title=f"layer {layer['layer']}: {layer[kind]['kept']:,} of {layer[kind]['dense']:,} "
                f"{layer[kind].get('unit', 'channels') if kind == 'mlp' else attention_unit}\n"
                f"{short(layer[kind]['parameters'])} parameters",
            )
            for layer in layers
        ]
        name = "attention" if kind == "attention" else "MLP"
        charts[kind] = columns(values, color=kind, height=height, label=f"Size of each layer's {name}")
    return charts


def descent_chart(search: Mapping[str, Any]) -> Markup:
    """Draw the KL of the best plan after each round of the descent, and of all plans compared."""
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
    series = Series(points=[begin, *points], color="found")
    return curve([series], label="KL by round of the descent", height=220)


def generations_chart(search: Mapping[str, Any]) -> Markup:
    """Draw the KL after trials: the best of each generation, and all plans of its last step."""
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
                f"\nchanged: {one['changed']['attention']} attention, {one['changed']['mlp']} MLP sites"
                if any(one["changed"].values())
                else ""
            ),
        )
        for one in generations
    ]
    series = Series(points=points, color="found", dots=len(points) <= 60)
    return curve([series], label="KL by generation", height=220)


def recovery_chart(recovery: Mapping[str, Any]) -> Markup:
    """Draw the training loss by step, averaged over intervals if there are many steps."""
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
    return curve([Series(points=points, color="recovered", dots=False)], label="Training loss by step", height=220)


def evaluations_chart(recovery: Mapping[str, Any], name: str, title: str) -> Markup:
    """Draw a value of the training's evaluations by step: `next_token` or `kl`."""
    points = [
        Point(x=one["step"], y=one[name], strong=True, title=f"step {one['step']:,}: {title} {one[name]:.3f}")
        for one in recovery["evaluations"]
    ]
    return curve([Series(points=points, color="recovered")], label=f"{title} by step", height=180)


def family_chart(sizes: Mapping[str, Mapping[str, Any]]) -> Markup:
    """Draw KL by parameters: a line for each kind of plan over all measured sizes."""
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
            lines.append(Series(points=points, color=kind))
    return curve(lines, label="KL by percentage of parameters", height=260, from_zero=True)
