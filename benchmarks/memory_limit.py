"""Run `darwinlm` in several processes, each with its own memory limit, enforced by the kernel (Linux, root).

    python benchmarks/memory_limit.py --limit 2.4GB --processes 2 prune smollm2 --target 0.6 --data FOLDER --out RUN …

Each process runs in its own control group and is killed if it needs more than the limit. The page cache counts towards
the limit, but is reclaimed when memory is short. The peak of each process is printed at the end.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from darwinlm.config.target import parse_target

ROOT = Path("/sys/fs/cgroup")
VERSION_1 = (ROOT / "memory").is_dir()


def main() -> None:
    if "DARWINLM_GROUP" in os.environ:
        join(Path(f"{os.environ['DARWINLM_GROUP']}-{os.environ['LOCAL_RANK']}"))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", required=True, help="memory limit of each process, such as 2.4GB")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="arguments of darwinlm")
    arguments = parser.parse_args()
    limit = int(parse_target(f"memory={arguments.limit}")["memory"])
    base = (ROOT / "memory" if VERSION_1 else ROOT) / f"darwinlm-{os.getpid()}"
    groups = [Path(f"{base}-{rank}") for rank in range(arguments.processes)]
    for group in groups:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if VERSION_1 else "memory.max")).write_text(str(limit))
    try:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.processes}"]
        command = [sys.executable, *launcher, __file__, *arguments.command]
        code = subprocess.run(command, env={**os.environ, "DARWINLM_GROUP": str(base)}, check=False).returncode
    finally:
        for rank, group in enumerate(groups):
            most = int((group / ("memory.max_usage_in_bytes" if VERSION_1 else "memory.peak")).read_text())
            print(f"process {rank}: peak {most / 1e6:,.0f} MB of {limit / 1e6:,.0f} MB, page cache included")
            group.rmdir()
    sys.exit(code)


def join(group: Path) -> None:
    """Move this process to its control group and run `darwinlm` in it."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    from darwinlm.cli import main as darwinlm

    sys.argv[0] = "darwinlm"
    darwinlm()


if __name__ == "__main__":
    main()
