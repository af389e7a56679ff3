"""Test runs on a full and on a read-only file system: one-line error, exit code 2, and the same command resumes.

    PYTHONPATH=tests unshare --map-root-user --mount python benchmarks/full_disk.py --sizes 12

A tiny run, with and without recovery, is started on tmpfs file systems of several sizes, so that each fills up at
another stage. Then the file system is enlarged, and the same command must produce the same bytes as an uninterrupted
run. A read-only file system is tested in the same way.
"""

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from helpers import SETTINGS, make_checkpoint
from kill import LONGER, result, start

WITHOUT_RECOVERY = {**LONGER, "recovery.tokens": 0, "recovery.refit_tokens": 0}


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def trials(root: Path, count: int, settings: dict[str, Any]) -> int:
    """Return the number of failures over `count` sizes and a read-only file system."""
    command = ["prune", str(root / "dense"), "--target", "0.7", "--data", str(root / "text.txt"), "--quiet"]
    for key, value in (SETTINGS | settings).items():
        command += ["--set", f"{key}={value}"]
    log, disk = root / "log.txt", root / "disk"
    mount(disk, "size=256M")
    whole = start([*command, "--out", str(disk / "run")], log)
    assert whole.code == 0, log.read_text()
    expected = result(disk / "run")
    used = sum(math.ceil(file.stat().st_size / 4096) * 4 for file in disk.rglob("*") if file.is_file())
    subprocess.run(["umount", str(disk)], check=True)
    print(f"a run needs {used} KiB")

    faults = 0
    sizes = [8 + round(number * used / count) // 4 * 4 for number in range(count)]
    for options in [*(f"size={size}K" for size in sizes), "ro"]:
        mount(disk, options)
        log.unlink(missing_ok=True)
        first = start([*command, "--out", str(disk / "run")], log)
        told = [line for line in log.read_text().splitlines() if line.startswith(("error", "Traceback"))]
        subprocess.run(["mount", "-o", "remount,rw,size=256M", str(disk)], check=True)
        again = start([*command, "--out", str(disk / "run")], log)
        same = again.code == 0 and result(disk / "run") == expected
        left = [path.name for path in disk.rglob("*.draft*")]
        good = first.code == 2 and len(told) == 1 and told[0].startswith("error: ") and same and not left
        faults += not good
        print(
            f"{options:>10}: {'as expected' if good else 'FAULT'}, code {first.code}, then {again.code}; "
            f"{' '.join(told).replace(str(disk), '')}",
            flush=True,
        )
        subprocess.run(["umount", str(disk)], check=True)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, default=12)
    arguments = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(50)]
        (root / "text.txt").write_text(" ".join(rng.choices(words, k=4_000)))
        make_checkpoint("qwen3", root / "dense")
        (root / "disk").mkdir()
        faults = sum(trials(root, arguments.sizes, settings) for settings in (LONGER, WITHOUT_RECOVERY))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
