"""Pruning by the plain formulas, one unit at a time, and random problems."""

import torch

from darwinlm.database.inverse import damping_ridge

DAMPING = 0.01


def problem(units, columns_per_unit, rows=12, tokens=400, seed=0):
    """Create correlated inputs, a low-rank signal with noise, so that other columns can replace removed ones."""
    generator = torch.Generator().manual_seed(seed)
    width = units * columns_per_unit
    signal = torch.randn(tokens, width // 3 + 1, generator=generator) @ torch.randn(
        width // 3 + 1, width, generator=generator
    )
    x = signal + 0.3 * torch.randn(tokens, width, generator=generator)
    weight = torch.randn(rows, width, generator=generator)
    return weight, x, (x.T @ x / tokens)


def hessian_of(gram):
    return gram.double() + damping_ridge(gram, DAMPING) * torch.eye(len(gram), dtype=torch.float64)


def one_at_a_time(weight, gram, columns_per_unit):
    """Return the order of removal by exhaustive search, with a new least-squares problem for each candidate."""
    hessian = hessian_of(gram)
    weight = weight.double()
    units = list(range(weight.shape[1] // columns_per_unit))
    order = []
    while len(units) > 1:
        costs = {}
        for unit in units:
            kept = [u for u in units if u != unit]
            refitted = least_squares(weight, hessian, columns(kept, columns_per_unit))
            change = weight - refitted
            costs[unit] = ((change @ hessian) * change).sum().item()
        order.append(min(costs, key=costs.get))
        units.remove(order[-1])
    return order


def columns(units, columns_per_unit):
    return [u * columns_per_unit + c for u in units for c in range(columns_per_unit)]


def least_squares(weight, hessian, kept):
    full = torch.zeros_like(weight)
    full[:, kept] = torch.linalg.solve(hessian[kept][:, kept], (weight @ hessian[:, kept]).T).T
    return full
