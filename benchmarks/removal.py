"""Remove columns by the plain formulas and by our solver; used by other benchmarks, with few imports."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from darwinlm.database.inverse import damped_inverse, damping_ridge
from darwinlm.database.solver import prune_site

SHAPES = {
    "smollm2": (576, 1536),
    "4096": (1536, 4096),
    "1b": (2048, 8192),
    "8b": (4096, 14_336),
    "70b": (8192, 28_672),
}
"""Rows and columns of the MLP's output projection."""
DAMPING = 0.01


@dataclass
class Result:
    seconds: float
    order: list[int] | None
    snapshots: dict[int, tuple[tuple[int, ...], Tensor]]


def problem(rows: int, columns: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Create a random weight and a Gram matrix with equal shared and private power in each input, scales 1 : 4."""
    generator = torch.Generator().manual_seed(seed)
    rank = columns // 8
    loadings = torch.randn(columns, rank, generator=generator).to(device)
    gram = (loadings @ loadings.T).div_(rank)
    gram.diagonal().add_(1.0)
    scale = (0.5 + 1.5 * torch.rand(columns, generator=generator)).to(device)
    gram *= scale[:, None] * scale
    return torch.randn(rows, columns, generator=generator).to(device) / columns**0.5, gram


def plain(weight: Tensor, gram: Tensor, sizes: list[int]) -> Result:
    """Remove one column at a time by the plain formulas."""
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
    wait(gram.device)
    return Result(time.perf_counter() - start, order, snapshots)


def ours(weight: Tensor, gram: Tensor, sizes: list[int]) -> Result:
    start = time.perf_counter()
    found = prune_site(weight, gram, columns_per_unit=1, sizes=sizes, damping=DAMPING)
    wait(gram.device)
    return Result(time.perf_counter() - start, None, {len(s.kept): (s.kept, s.weight_OK) for s in found})


def output_error(weight: Tensor, gram: Tensor, kept: tuple[int, ...], refitted: Tensor) -> float:
    change = weight.clone()
    change[:, list(kept)] -= refitted
    return ((change @ gram) * change).sum(dtype=torch.float64).item()


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
