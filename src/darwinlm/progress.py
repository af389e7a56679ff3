"""How far long work has come: a bar with the time left on a terminal, plain lines everywhere else."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("darwinlm")

_bars = False


class Task(Protocol):
    """A piece of work in countable steps."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Say that `steps` more are done; `note` is shown beside the bar."""


class _Bar:
    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self._progress = progress
        self._id = progress.add_task(name, total=total, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._progress.update(self._id, advance=steps, note=note)


class _Lines:
    """At most one line every ten seconds, and one at the end."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        self._start = self._last = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        now = time.monotonic()
        if self._done < self._total and now - self._last < 10:
            return
        self._last = now
        spent = now - self._start
        left = spent / self._done * (self._total - self._done)
        tail = f", {note}" if note else ""
        log.info("%s: %d/%d, %.0f s, about %.0f s left%s", self._name, self._done, self._total, spent, left, tail)


def set_up(*, quiet: bool) -> None:
    """Decide once how progress is shown, and send the package's log lines to standard error."""
    global _bars
    _bars = not quiet and sys.stderr.isatty()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


@contextmanager
def task(name: str, total: int) -> Iterator[Task]:
    """Show the progress of `total` steps called `name` while the block runs."""
    if not _bars:
        yield _Lines(name, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _Bar(progress, name, total)
