"""The report: one self-contained page, generated only from `metrics.json`."""

import base64
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from darwinlm.errors import UserError
from darwinlm.report import figures, numbers
from darwinlm.report.facts import collect
from darwinlm.report.layers import mlp_unit
from darwinlm.runtime.files import write_bytes
from darwinlm.runtime.progress import log

_TEMPLATES = "templates"
_NUMBERS: tuple[Callable[..., str], ...] = (
    *(numbers.count, numbers.short, numbers.percent, numbers.kl, numbers.plain, numbers.fixed, numbers.signed),
    *(numbers.signed_percent, numbers.probability, numbers.times, numbers.duration, numbers.memory, numbers.model_name),
)
_FIGURES: tuple[Callable[..., Any], ...] = (
    *(
        figures.layer_charts,
        figures.descent_chart,
        figures.generations_chart,
        figures.recovery_chart,
        figures.evaluations_chart,
    ),
    *(figures.family_chart, figures.task_color, figures.task_key),
)
_WATCH_SECONDS = 2.0


def refresh_report(run: Path) -> None:
    """Write the report; damaged files that only the report shows do not make a finished run fail."""
    try:
        write_report(run)
    except UserError as error:
        if not (run / "report" / "metrics.json").exists():
            raise
        log.warning("report not updated: %s", str(error).split("; ")[0])


def write_report(run: Path, *, refresh: bool = False) -> dict[str, Any]:
    """Write `report/metrics.json` and `report/index.html` of the run in the folder `run`, finished or not.

    Unchanged files are not written again.

    Args:
        run: run directory.
        refresh: whether the page reloads itself every few seconds while the run is unfinished.

    Returns:
        The content of `metrics.json`.

    Raises:
        UserError: if `run` is not a run, a file in it is damaged, or the report cannot be written.
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
    """Update the report of the run in the folder `run` until it is finished, or until interrupted.

    Raises:
        UserError: see `write_report`.
    """
    try:
        while not (metrics := write_report(run, refresh=True))["finished"]:
            wait()
    except KeyboardInterrupt:
        write_report(run)
        raise
    return metrics


def render(metrics: Mapping[str, Any], *, refresh: bool = False) -> str:
    """Render the page for the result of `facts.collect`. All text is escaped, and only its own scripts can run."""
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
            # Both are files of this package, not user text.
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
    environment.filters |= {function.__name__: function for function in _NUMBERS}
    functions = (*_FIGURES, numbers.kl, numbers.plain, mlp_unit)
    environment.globals |= {function.__name__: function for function in functions}
    return environment
