"""Kill a run with SIGKILL at many moments: compare the resumed runs byte by byte, and measure the repeated work.

    PYTHONPATH=tests python benchmarks/kill.py --kills 50 --seed 0

A run of a tiny model is killed once at each moment and started again with the same command. A third of the moments are
between writing a file's draft and renaming it, a third right after a rename, both spread evenly over all files that a
run writes; a third are at any time. The result is compared byte by byte with an uninterrupted run: corpus, database,
search, recovery and model; of the metrics, all that is not a timing. Exits with 1 if anything differs or a draft
remains.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from helpers import SETTINGS, files_of, make_checkpoint

# Imported once here: every run is forked from this process, which saves seconds of imports.
from darwinlm import cli, pipeline  # noqa: F401
from darwinlm.report import summary  # noqa: F401
from darwinlm.runtime.files import read_json

LONGER = {"search.generations": 6, "search.offspring": 6, "recovery.tokens": 512, "recovery.checkpoint_steps": 2}
STAGES = ("corpus", "database", "search", "recovery", "evaluation", "export")


@dataclass(frozen=True)
class Moment:
    """Moment of a kill: before or after a rename (by number, from 1), or in seconds after the start."""

    kind: str
    at: float

    def __str__(self) -> str:
        return f"{self.at:.2f} s" if self.kind == "time" else f"{self.kind} rename {self.at:.0f}"


@dataclass(frozen=True)
class Ended:
    """Outcome of a process that worked on a run."""

    code: int
    """Exit code, or minus the signal that ended it."""
    seconds: float
    renames: int
    since_rename: float
    """Seconds from its last rename (or its start) to its end."""


def start(command: list[str], log: Path, moment: Moment | None = None) -> Ended:
    """Run `darwinlm` in a child of this process, killed at `moment`."""
    reading, writing = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(command, log, moment, writing)
    os.close(writing)
    timer = None
    if moment is not None and moment.kind == "time":
        timer = threading.Timer(moment.at, os.kill, (child, signal.SIGKILL))
        timer.start()
    with open(reading) as lines:
        times = [float(line) for line in lines]  # ends when the child does
    ended = time.monotonic()
    if timer is not None:
        timer.cancel()
    status = os.waitpid(child, 0)[1]
    return Ended(os.waitstatus_to_exitcode(status), ended - began, len(times), ended - max([began, *times]))


def _work(command: list[str], log: Path, moment: Moment | None, writing: int) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    replace, count = os.replace, 0

    def watched(source: Any, destination: Any) -> None:
        nonlocal count
        count += 1
        if moment is not None and moment.kind == "before" and count == moment.at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, destination)
        os.write(writing, f"{time.monotonic()}\n".encode())
        if moment is not None and moment.kind == "after" and count == moment.at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = watched
    code = 1
    try:
        code = cli.exit_code(command)
    finally:
        sys.stdout.flush()
        os._exit(code)


def moments(count: int, renames: int, seconds: float, rng: random.Random) -> list[Moment]:
    """Return `count` moments, a third of each kind, each third spread evenly with random offsets."""
    found = []
    for number in range(count):
        kind = ("before", "after", "time")[number % 3]
        share = (number // 3 + rng.random()) / -(-count // 3)
        found.append(Moment(kind, share * seconds if kind == "time" else 1 + int(share * renames)))
    return found


def stage_of(out: Path) -> str:
    """Return the first unfinished stage after a kill."""
    if not (out / "manifest.json").exists():
        return "start"
    stages = read_json(out / "manifest.json")["stages"]
    return next((stage for stage in STAGES if not stages.get(stage, {}).get("done")), "end")


def result(out: Path) -> dict[str, Any]:
    """Return the files and metrics that must be identical in all runs."""
    metrics = read_json(out / "report" / "metrics.json")
    rows = [{key: row[key] for key in ("name", "parameters", "perplexity", "kl")} for row in metrics["rows"]]
    return files_of(out) | {"metrics": (rows, metrics["sample"])}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(50)]
        (root / "text.txt").write_text(" ".join(rng.choices(words, k=4_000)))
        make_checkpoint("qwen3", root / "dense")
        command = ["prune", str(root / "dense"), "--target", "0.7", "--data", str(root / "text.txt"), "--quiet"]
        for key, value in (SETTINGS | LONGER).items():
            command += ["--set", f"{key}={value}"]
        log = root / "log.txt"
        start([*command, "--out", str(root / "first")], log)  # warm-up: the page cache is cold
        whole = start([*command, "--out", str(root / "whole")], log)
        assert whole.code == 0, log.read_text()
        expected = result(root / "whole")
        print(f"uninterrupted: {whole.seconds:.2f} s, {whole.renames} files renamed, {len(expected) - 1} compared")

        lost, extra, faults, hit = [], [], 0, Counter[str]()
        for number, moment in enumerate(moments(arguments.kills, whole.renames, whole.seconds, rng), 1):
            out = root / "killed"
            killed = start([*command, "--out", str(out)], log, moment)
            stage = stage_of(out)
            again = start([*command, "--out", str(out)], log)
            fault = ""
            if again.code != 0:
                fault = f"exit code {again.code}: {log.read_text().splitlines()[-1]}"
            else:
                found = result(out)
                differing = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
                left = [str(path.relative_to(out)) for path in out.rglob("*.draft*")]
                fault = ", ".join([*(f"{key} differs" for key in differing), *(f"{path} remains" for path in left)])
            faults += bool(fault)
            hit[stage] += 1
            if killed.code == -signal.SIGKILL:
                lost.append(killed.since_rename)
                extra.append(killed.seconds + again.seconds - whole.seconds)
            print(
                f"{number:3} {moment!s:>17} in {stage:10} after {killed.seconds:5.2f} s, {killed.since_rename:5.2f} s "
                f"after the last file: {fault or 'identical'}",
                flush=True,
            )
            shutil.rmtree(out)
    print(f"\n{arguments.kills - faults} of {arguments.kills} identical; kills by stage: {dict(hit)}")
    print(f"seconds of work repeated (since the last file): median {statistics.median(lost):.2f}, max {max(lost):.2f}")
    print(f"extra seconds in total, second start included: median {statistics.median(extra):.2f}, max {max(extra):.2f}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
