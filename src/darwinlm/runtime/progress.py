"""Progress of long work: a bar with the remaining time on a terminal, plain log lines elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("darwinlm")

_bars = False


def printable(text: str) -> str:
    """Return `text` on one line without control characters, which could control the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class Task(Protocol):
    """Work in countable steps."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Report that `steps` more are done; `note` is shown next to the bar."""


class _Bar:
    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self._progress = progress
        self._id = progress.add_task(name, total=total, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._progress.update(self._id, advance=steps, note=note)


class _Lines:
    """Progress as log lines: at most one every ten seconds, and one at the end."""

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


def set_up(*, quiet: bool, silent: bool = False) -> None:
    """Choose how progress is shown, and send the package's log to standard error; `silent` only shows errors."""
    global _bars
    _bars = not quiet and not silent and sys.stderr.isatty()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.ERROR if silent else logging.INFO)
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


class Phases:
    """Seconds by phase of a stage. Phases nest: time in an inner phase is not counted in the outer."""

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._synchronize = synchronize
        self._names: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the block's time as `name`."""
        self._charge()
        self._names.append(name)
        try:
            yield
        finally:
            self._charge()
            self._names.pop()

    def add(self, name: str, seconds: float) -> None:
        """Add time spent in parallel to the stage as `name`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _charge(self) -> None:
        if self._synchronize is not None:
            self._synchronize()
        now = time.perf_counter()
        if self._names:
            self.add(self._names[-1], now - self._since)
        self._since = now
