"""Second-order structured pruning: which units go, in which order, and what the others make up for (paper, 3.1).

Dimension letters: O output rows, I input columns, U units, C columns of a unit, K kept columns, B removals in a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A site at one level."""

    kept: tuple[int, ...]
    """Unit indices, ascending."""
    weight_OK: Tensor
    """The output projection's surviving columns, refitted: float32."""
    error: float
    """tr(dW G dW^T), G = X^T X / tokens: squared output error per token."""


def damped(gram_II: Tensor, damping: float) -> Tensor:
    """H = G + damping * mean(diag G) * I in float64. A site whose inputs are always zero gets the identity."""
    hessian_II = gram_II.double()
    mean = hessian_II.diagonal().mean()
    ridge = damping * mean if mean > 0 else torch.ones_like(mean)
    return hessian_II + ridge * torch.eye(len(gram_II), dtype=torch.float64, device=gram_II.device)


def prune_site(
    weight_OI: Tensor, gram_II: Tensor, *, columns_per_unit: int, sizes: Sequence[int], damping: float
) -> list[Snapshot]:
    """Remove units one by one, always the one whose removal costs least, and keep a snapshot at each size.

    Removing the columns S of a unit, with the others refitted, adds `tr(W_S (H^-1_SS)^-1 W_S^T)` to the squared output
    error (score), moves `W <- W - W_S (H^-1_SS)^-1 H^-1_S` (refit) and `H^-1 <- H^-1 - H^-1_S^T (H^-1_SS)^-1 H^-1_S`
    (shrink). Everything is float64 inside.

    Args:
        weight_OI: the dense output projection.
        gram_II: X^T X / tokens of its inputs.
        columns_per_unit: unit u owns columns u*C to u*C + C - 1.
        sizes: units kept at each snapshot, descending; neither all nor none of them.
        damping: lambda of `damped`.

    Returns:
        One snapshot for each of `sizes`.
    """
    hessian_II = damped(gram_II, damping)
    dense_OI = weight_OI.double()
    output_error = _OutputError(dense_OI, hessian_II, ridge=(hessian_II[0, 0] - gram_II[0, 0].double()).item())
    state = _State(dense_OI, torch.cholesky_inverse(torch.linalg.cholesky(hessian_II)), columns_per_unit)
    del hessian_II
    snapshots = []
    for size in sizes:
        state.remove(len(state.units) - size)
        error = output_error(state.weight_OI, state.columns())
        snapshots.append(Snapshot(tuple(state.units.tolist()), state.weight_OI.float().contiguous(), error))
    return snapshots


def removal_error(weight_OI: Tensor, gram_II: Tensor) -> float:
    """tr(W G W^T): the squared output per token, which is the error of removing the whole site."""
    weight_OI = weight_OI.float()
    return max(0.0, ((weight_OI @ gram_II) * weight_OI).sum().item())


class _OutputError:
    """tr(dW G dW^T) of a refitted weight, for O * I operations instead of O * I * I.

    A refit on the kept columns K solves W_K H_KK = W H_:K, so tr(dW H dW^T) = <W H, W> - <(W H)_K, W_K>; taking the
    ridge's share, ridge * |dW|^2, leaves the error in the outputs themselves.
    """

    def __init__(self, dense_OI: Tensor, hessian_II: Tensor, ridge: float) -> None:
        self._dense_OI, self._ridge = dense_OI, ridge
        self._product_OI = dense_OI @ hessian_II
        self._total = (self._product_OI * dense_OI).sum()

    def __call__(self, weight_OK: Tensor, columns_K: Tensor) -> float:
        change_OI = self._dense_OI.clone()
        change_OI[:, columns_K] -= weight_OK
        damped_error = self._total - (self._product_OI[:, columns_K] * weight_OK).sum()
        return max(0.0, (damped_error - self._ridge * change_OI.square().sum()).item())


class _State:
    """What is left of a site: its units, weight and inverse, without the removed columns."""

    def __init__(self, weight_OI: Tensor, inverse_II: Tensor, columns_per_unit: int) -> None:
        self.C = columns_per_unit
        self.units = torch.arange(weight_OI.shape[1] // columns_per_unit, device=weight_OI.device)
        self.weight_OI = weight_OI
        self.inverse_II = inverse_II
        self.gram_II = weight_OI.T @ weight_OI if columns_per_unit == 1 else None
        """W^T W; kept up to date with the weight where units are single columns."""

    def columns(self) -> Tensor:
        """The dense columns that are left."""
        return (self.units[:, None] * self.C + torch.arange(self.C, device=self.units.device)).flatten()

    def remove(self, count: int) -> None:
        """Remove `count` more units."""
        while count > 0:
            block = min(count, BLOCK) if self.C == 1 else 1
            removed_B = self._choose_single(block) if self.C == 1 else self._choose_group()
            self._eliminate(removed_B)
            count -= block

    def _choose_group(self) -> Tensor:
        U, C = len(self.units), self.C
        blocks_UCC = self.inverse_II.view(U, C, U, C).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        weight_UCO = self.weight_OI.T.reshape(U, C, -1)
        scores_U: Tensor = (weight_UCO * torch.linalg.solve(blocks_UCC, weight_UCO)).sum(dim=(1, 2))
        return scores_U.argmin().unsqueeze(0)

    def _choose_single(self, block: int) -> Tensor:
        """The next `block` single columns in greedy order, without touching the big matrices.

        With P = H^-1 and G = W^T W a column's score is G_jj / P_jj. Removing column s changes these by low-rank terms:
        P' = P - u u^T with u = P_s / sqrt(P_ss), and W' = W - w u^T with w = W_s / sqrt(P_ss) gives
        G' = G - g u^T - u g^T + (w.w) u u^T with g = W^T w. So per removal one row of P and of G is read and corrected
        by the terms so far, O(I * removals in the block), instead of rewriting I * I numbers.
        """
        assert self.gram_II is not None
        inverse_II, gram_II = self.inverse_II, self.gram_II
        size = len(inverse_II)
        inverse_I, gram_I = inverse_II.diagonal().clone(), gram_II.diagonal().clone()
        u_BI = inverse_II.new_zeros(block, size)
        h_BI = inverse_II.new_zeros(block, size)
        alive_I = torch.ones(size, dtype=torch.bool, device=inverse_II.device)
        infinity = inverse_II.new_full((), torch.inf)
        removed_B = torch.zeros(block, dtype=torch.long, device=inverse_II.device)
        for step in range(block):
            scores_I = torch.where(alive_I, gram_I / inverse_I, infinity)
            s = scores_I.argmin()
            removed_B[step] = s
            u, h = u_BI[:step], h_BI[:step]
            root = inverse_I[s].sqrt()
            row_I = (inverse_II[s] - u[:, s] @ u) / root
            # G' = G - sum(u h^T + h u^T) with h = g - (w.w) u / 2
            gram_row_I = gram_II[s] - u[:, s] @ h - h[:, s] @ u
            g_I = gram_row_I / root
            h_I = g_I - 0.5 * (gram_I[s] / inverse_I[s]) * row_I
            u_BI[step], h_BI[step] = row_I, h_I
            inverse_I = inverse_I - row_I.square()
            gram_I = gram_I - 2 * row_I * h_I
            alive_I[s] = False
        self.gram_II = gram_II.addmm(u_BI.T, h_BI, alpha=-1).addmm_(h_BI.T, u_BI, alpha=-1)
        return removed_B

    def _eliminate(self, removed_B: Tensor) -> None:
        """Refit and shrink for the units at positions `removed_B`, and drop their columns."""
        kept_U = torch.ones(len(self.units), dtype=torch.bool, device=self.units.device)
        kept_U[removed_B] = False
        gone_U = ~kept_U
        gone_I = gone_U.repeat_interleave(self.C)
        gone, kept = gone_I.nonzero()[:, 0], (~gone_I).nonzero()[:, 0]
        inverse_SK = self.inverse_II[gone][:, kept]
        factor_SS = torch.linalg.cholesky(self.inverse_II[gone][:, gone])
        solved_SK = torch.cholesky_solve(inverse_SK, factor_SS)
        self.weight_OI = self.weight_OI[:, kept] - self.weight_OI[:, gone] @ solved_SK
        self.inverse_II = self.inverse_II[kept][:, kept].addmm_(inverse_SK.T, solved_SK, alpha=-1)
        if self.gram_II is not None:
            self.gram_II = self.gram_II[kept][:, kept]
        self.units = self.units[kept_U]
