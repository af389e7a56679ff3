"""Checks with a difference and the most that it may be, as a table: what `darwinlm doctor` shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from darwinlm.progress import printable

_STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one check came to."""

    name: str
    result: Literal["passed", "failed", "skipped"]
    difference: float | None = None
    """The largest between two values, over the largest expected; None if nothing was compared."""
    tolerance: float | None = None
    """The most that the difference may be."""
    note: str = ""
    """Why it was skipped or what went wrong; the engine of an export."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What the checks of a model came to."""

    title: str
    reduced: tuple[str, ...]
    """What was made smaller, so that the checks are cheap."""
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed; one that was skipped has not."""
        return not self._count("failed")

    def summary(self) -> str:
        """The last line."""
        parts = [f"{count} {result}" for result in _STYLES if (count := self._count(result))]
        return ", ".join(parts)

    def _count(self, result: str) -> int:
        return sum(check.result == result for check in self.checks)


def show_checks(examination: Examination, console: Console) -> None:
    """Print a line a check."""
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
