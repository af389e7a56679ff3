"""The solver against plain one-at-a-time removal, paired in one run: `python benchmarks/database.py solver --shape 8b`.

Both get the same output projection and Gram matrix, remove columns in greedy order, refit after every removal and keep ten
snapshots. The plain way is what the formulas say: full matrices in float32, a rank-one update of the inverse and of the weight
for each removal. Where that would take hours, `--removals` lets both stop early, and the ratio is of that part.
"""

import argparse
import json
import platform
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from darwinlm.database.solver import damped_inverse, damping_ridge, prune_site

SHAPES = {
    "smollm2": (576, 1536),
    "4096": (1536, 4096),
    "1b": (2048, 8192),
    "8b": (4096, 14_336),
    "70b": (8192, 28_672),
}
"""Rows and columns of the MLP's output projection."""
DAMPING = 0.01
LEVELS = 10


@dataclass
class Result:
    seconds: float
    order: list[int] | None
    snapshots: dict[int, tuple[tuple[int, ...], Tensor]]


def problem(rows: int, columns: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A random weight and a Gram matrix with as much shared as private power in each input, scales 1 : 4."""
    generator = torch.Generator().manual_seed(seed)
    rank = columns // 8
    loadings = torch.randn(columns, rank, generator=generator).to(device)
    gram = (loadings @ loadings.T).div_(rank)
    gram.diagonal().add_(1.0)
    scale = (0.5 + 1.5 * torch.rand(columns, generator=generator)).to(device)
    gram *= scale[:, None] * scale
    return torch.randn(rows, columns, generator=generator).to(device) / columns**0.5, gram


def plain(weight: Tensor, gram: Tensor, sizes: list[int]) -> Result:
    """One column at a time, as the formulas say."""
    start = time.perf_counter()
    inverse = damped_inverse(gram, damping_ridge(gram, DAMPING))
    weight = weight.clone()
    alive = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    order: list[int] = []
    snapshots = {}
    for removed in range(1, len(gram) - min(sizes) + 1):
        scores = (weight.square().sum(0) / inverse.diagonal()).masked_fill_(~alive, torch.inf)
        column = int(scores.argmin())
        pivot = inverse[column, column].clone()
        row = inverse[column].clone()
        weight -= torch.outer(weight[:, column] / pivot, row)
        inverse -= torch.outer(row / pivot, row)
        alive[column] = False
        weight[:, column] = 0
        inverse[column, :], inverse[:, column], inverse[column, column] = 0, 0, 1
        order.append(column)
        if len(gram) - removed in sizes:
            kept = alive.nonzero()[:, 0]
            snapshots[len(kept)] = (tuple(kept.tolist()), weight[:, kept].clone())
    _wait(gram.device)
    return Result(time.perf_counter() - start, order, snapshots)


def ours(weight: Tensor, gram: Tensor, sizes: list[int]) -> Result:
    start = time.perf_counter()
    found = prune_site(weight, gram, columns_per_unit=1, sizes=sizes, damping=DAMPING)
    _wait(gram.device)
    return Result(time.perf_counter() - start, None, {len(s.kept): (s.kept, s.weight_OK) for s in found})


def output_error(weight: Tensor, gram: Tensor, kept: tuple[int, ...], refitted: Tensor) -> float:
    change = weight.clone()
    change[:, list(kept)] -= refitted
    return ((change @ gram) * change).sum(dtype=torch.float64).item()


def compare_solvers(shape: str, removals: int | None, seed: int, device: torch.device, repeats: int) -> None:
    rows, columns = SHAPES[shape]
    weight, gram = problem(rows, columns, seed, device)
    last = columns - removals if removals else 0
    sizes = sorted({max(1, last, round(columns - (columns - last) * i / LEVELS)) for i in range(1, LEVELS + 1)})[::-1]
    ours(weight[:, :256].clone(), gram[:256, :256].clone(), [128])  # the first call of anything is slow
    best = min((ours(weight, gram, sizes) for _ in range(repeats)), key=lambda result: result.seconds)
    reference = plain(weight, gram, sizes)
    print(f"d = {columns}, rows {rows}, {columns - min(sizes)} of {columns} columns removed, {len(sizes)} snapshots, seed {seed}")
    print(f"plain {reference.seconds:.2f} s, ours {best.seconds:.2f} s: {reference.seconds / best.seconds:.1f} times faster")
    same = differ = 0
    worst = 0.0
    for size in sizes:
        (kept, refitted), (kept_plain, refitted_plain) = best.snapshots[size], reference.snapshots[size]
        here = output_error(weight, gram, kept, refitted)
        there = output_error(weight, gram, kept_plain, refitted_plain)
        worst = max(worst, here / there - 1, key=abs)
        same += kept == kept_plain
        differ += len(set(kept) ^ set(kept_plain)) // 2
    print(f"kept columns identical at {same} of {len(sizes)} levels ({differ} columns differ in all)")
    print(f"true output error, ours against plain: at most {worst:+.4%} apart")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    solver = commands.add_parser("solver", help="our solver against the plain reference")
    solver.add_argument("--shape", choices=SHAPES, default="smollm2")
    solver.add_argument("--removals", type=int, help="stop both after so many columns")
    solver.add_argument("--repeats", type=int, default=3, help="runs of ours; the fastest counts")
    for command in (solver,):
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(json.dumps({"device": name, "machine": platform.processor() or platform.machine(), "torch": torch.__version__}))
    with torch.no_grad():
        compare_solvers(arguments.shape, arguments.removals, arguments.seed, device, arguments.repeats)


if __name__ == "__main__":
    main()
