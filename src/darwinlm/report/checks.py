"""Results of `darwinlm doctor`: checks with their differences and tolerances, as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from darwinlm.runtime.progress import printable

_STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result of one check."""

    name: str
    result: Literal["passed", "failed", "skipped"]
    difference: float | None = None
    """Largest difference between two values, relative to the largest expected; None if nothing was compared."""
    tolerance: float | None = None
    """Maximum accepted difference."""
    note: str = ""
    """Reason of a skip or failure; the engine of an export."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Results of the checks of a model."""

    title: str
    reduced: tuple[str, ...]
    """What was reduced to keep the checks cheap."""
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed; skipped checks do not count as failed."""
        return not self._count("failed")

    def summary(self) -> str:
        """Return the counts of results, for the last line."""
        parts = [f"{count} {result}" for result in _STYLES if (count := self._count(result))]
        return ", ".join(parts)

    def _count(self, result: str) -> int:
        return sum(check.result == result for check in self.checks)


def show_checks(examination: Examination, console: Console) -> None:
    """Print one line per check."""
    table = Table(title=escape(printable(examination.title)), title_justify="left")
    table.add_column("check", overflow="fold")
    for title in ("difference", "at most"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("note", overflow="fold")
    for check in examination.checks:
        numbers = ["" if number is None else f"{number:.1e}" for number in (check.difference, check.tolerance)]
        style = _STYLES[check.result]
        table.add_row(check.name, *numbers, f"[{style}]{check.result}[/]", escape(printable(check.note)))
    console.print(table)
    for line in _lines(examination.reduced):
        console.print(line, highlight=False, markup=False)
    console.print(examination.summary(), highlight=False, markup=False)


def _lines(reduced: Sequence[str]) -> list[str]:
    return [f"reduced: {printable(line)}" for line in reduced]
