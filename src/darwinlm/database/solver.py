"""Second-order structured pruning: which units to remove, in which order, and the refit of the others (paper, section
3).

Removing the columns S of a unit from W, with all others refitted, adds `tr(W_S (P_SS)^-1 W_S^T)` to the squared output
error (score), where P is the inverse of the damped Gram matrix H; it updates `W <- W - W_S (P_SS)^-1 P_S` (refit) and
`P <- P - P_S^T (P_SS)^-1 P_S` (shrink). `docs/method.md` derives the equivalent algorithm in blocks.

Dimension letters: O output rows, I input columns, U units, C columns of a unit, K kept columns, n columns in the
working matrices, F of them that move, B removals in a block, D columns it is chosen from, R random probes, X any rows.
"""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from darwinlm.database.inverse import damped_inverse, damping_ridge, inverse_if_float32_suffices, times
from darwinlm.database.symmetric import add_symmetric, mirror
from darwinlm.runtime.progress import log

BLOCK = 256
"""Maximum number of removals between two updates of the big matrices."""
_CANDIDATES, _FEWEST = 1.5, 32
"""Number of candidate columns per removal in a block, and minimum number of candidates."""
_MORE = 1.5
"""Factor by which candidates are increased after a block in which they were not enough."""
_EXCESS = 2e-4
"""Maximum share of a level's error caused by rounding, above which the inverse is recomputed."""
_PROBES = 8

_Choose = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A site at one level."""

    kept: tuple[int, ...]
    """Kept unit indices, ascending."""
    weight_OK: Tensor
    """Remaining columns of the output projection, refitted: float32."""
    error: float
    """Error tr(dW G dW^T), without the damping."""
    channels_EK: Tensor | None = None
    """If units are channels of experts, the channels that each expert keeps, ascending."""


@torch.no_grad()
def prune_site(
    weight_OI: Tensor, gram_II: Tensor, *, columns_per_unit: int, sizes: Sequence[int], damping: float
) -> list[Snapshot]:
    """Remove units one by one, each time the one of lowest score (ties: lowest index), with a snapshot at each size.

    Everything is computed in float32 and checked. If random probes find the inverse not accurate enough, it is computed
    in float64; at each snapshot other probes estimate the error added by rounding, and if it matters, inverse and refit
    are recomputed.

    Args:
        weight_OI: dense output projection.
        gram_II: Gram matrix G of its inputs, float32.
        columns_per_unit: unit u owns columns u*C to u*C + C - 1.
        sizes: units kept at each snapshot, descending; neither all nor none of them.
        damping: lambda in H = G + lambda * mean(diag G) * I.

    Returns:
        One snapshot for each of `sizes`.
    """
    if weight_OI.device.type == "mps":  # MPS has no float64.
        weight_OI, gram_II = weight_OI.cpu(), gram_II.cpu()
    ridge = damping_ridge(gram_II, damping)
    dense_IO = weight_OI.T.contiguous().float()
    state = (_Columns if columns_per_unit == 1 else _Blocks)(dense_IO, gram_II, ridge, columns_per_unit)
    snapshots = []
    with _numpy_threads().limit(limits=1):  # More threads would compete with PyTorch's.
        for size in sizes:
            state.remove(state.units_left - size)
            snapshots.append(state.snapshot())
    return snapshots


def removal_error(weight_OI: Tensor, gram_II: Tensor) -> float:
    """Return tr(W G W^T), the error of removing the whole site."""
    weight_OI = weight_OI.float()
    return max(0.0, ((weight_OI @ gram_II) * weight_OI).sum().item())


class _State:
    """State of a site during pruning: `weight_nO` and `inverse_nn` hold the remaining columns, in their own order."""

    def __init__(self, dense_IO: Tensor, gram_II: Tensor, ridge: float, columns_per_unit: int) -> None:
        self.C = columns_per_unit
        self.dense_IO, self.gram_II, self.ridge = dense_IO, gram_II, ridge
        """Transposed, like the working copy: columns of the projection are moved as rows."""
        self.squares_I = torch.linalg.vector_norm(dense_IO, dim=1).double().square_()
        self.units_n = torch.arange(len(dense_IO) // columns_per_unit, device=dense_IO.device)
        """Remaining units, in the order of the matrices."""
        self.weight_nO = dense_IO.clone()
        self.inverse_nn = self._first_inverse()
        self.damped_error = torch.zeros((), dtype=torch.float64, device=dense_IO.device)
        """Damped error tr(dW H dW^T): the sum of the scores of all removals so far."""
        generator = torch.Generator().manual_seed(0)
        signs_RO = torch.randint(0, 2, (_PROBES, dense_IO.shape[1]), generator=generator) * 2 - 1
        self.signs_RO = signs_RO.to(dense_IO.device, torch.float32)
        rows_RI = self.signs_RO @ dense_IO.T
        self.target_RI = times(rows_RI, gram_II) + ridge * rows_RI

    @property
    def units_left(self) -> int:
        return len(self.units_n)

    def _first_inverse(self) -> Tensor:
        return damped_inverse(self.gram_II, self.ridge)

    def apply(self, gone_B: Tensor, u_Bn: Tensor, v_BO: Tensor) -> None:
        """Remove units, then subtract u^T u from P and u^T v from W^T.

        The last remaining units move to the places of the removed ones, and the matrices are narrowed, in place.
        """
        left, B = self.units_left - len(gone_B), len(gone_B)
        # Holes come first, and so do the units that fill them, in equal number. The rest of both lists are removed
        # units at the end, which are copied onto each other and narrowed off. So no size depends on the data, and
        # nothing synchronizes.
        gone_U = torch.zeros(left + B, dtype=torch.uint8, device=gone_B.device).index_fill_(0, gone_B, 1)
        holes_B = gone_B.index_select(0, (gone_B >= left).to(torch.uint8).argsort(stable=True))
        fillers_B = gone_U[left:].argsort(stable=True).add_(left)
        holes, fillers = _columns_of(holes_B, self.C), _columns_of(fillers_B, self.C)
        size = left * self.C
        rows_Fn = self.inverse_nn.index_select(0, fillers)
        rows_Fn.index_copy_(1, holes, rows_Fn.index_select(1, fillers))
        self.inverse_nn.index_copy_(0, holes, rows_Fn)
        self.inverse_nn.index_copy_(1, holes, rows_Fn.T)
        self.weight_nO.index_copy_(0, holes, self.weight_nO.index_select(0, fillers))
        self.units_n.index_copy_(0, holes_B, self.units_n.index_select(0, fillers_B))
        self.inverse_nn = self.inverse_nn[:size, :size]
        self.weight_nO = self.weight_nO[:size]
        self.units_n = self.units_n[:left]
        u_BK = u_Bn.index_copy_(1, holes, u_Bn.index_select(1, fillers))[:, :size]
        self.weight_nO.addmm_(u_BK.T, v_BO, alpha=-1)
        add_symmetric(self.inverse_nn, u_BK.T, u_BK, alpha=-1)
        mirror(self.inverse_nn)

    def snapshot(self) -> Snapshot:
        """Return the remaining units and columns, after checking for rounding errors."""
        if self._spoilt():
            self.renew()
        columns_n = _columns_of(self.units_n, self.C)
        moved_nO = self.weight_nO - self.dense_IO.index_select(0, columns_n)
        moved = self.squares_I.sum() - self.squares_I.index_select(0, columns_n).sum() + moved_nO.norm().square()
        error = max(0.0, (self.damped_error - self.ridge * moved).item())
        units_U, order_U = self.units_n.sort()
        weight_OK = self.weight_nO.index_select(0, _columns_of(order_U, self.C)).T
        return Snapshot(tuple(units_U.tolist()), weight_OK, error)

    def _residual(self, columns_K: Tensor) -> Tensor:
        """Return W_K H_KK - (W H)_K for the probes' random sums of rows: zero for an exact refit."""
        rows_RK = (self.weight_nO @ self.signs_RO.T).T
        rows_RI = torch.zeros_like(self.target_RI).index_copy_(1, columns_K, rows_RK)
        if 2 * len(columns_K) < len(self.gram_II):  # Copying these rows is cheaper than reading all.
            product_RK = times(rows_RI, self.gram_II.index_select(0, columns_K))
        else:
            product_RK = times(rows_RI, self.gram_II).index_select(1, columns_K)
        return product_RK + self.ridge * rows_RK - self.target_RI.index_select(1, columns_K)

    def _spoilt(self) -> bool:
        """Whether the error exceeds that of the exact refit by too much, estimated by tr(R P R^T) of a residual R."""
        residual_RK = self._residual(_columns_of(self.units_n, self.C))
        allowed = _EXCESS * self.damped_error.item() * _PROBES
        if residual_RK.norm().square().item() <= allowed * self.ridge:  # No eigenvalue of P exceeds 1 / ridge.
            return False
        return not (times(residual_RK, self.inverse_nn) * residual_RK).sum().item() <= allowed

    def renew(self) -> None:
        """Recompute inverse, refit and error from the Gram matrix."""
        columns_K = _columns_of(self.units_n, self.C)
        self.inverse_nn = damped_inverse(self.gram_II[columns_K][:, columns_K], self.ridge)
        target_KO = self.gram_II[columns_K] @ self.dense_IO + self.ridge * self.dense_IO[columns_K]
        self.weight_nO = self.inverse_nn @ target_KO
        change_IO = self.dense_IO.clone()
        change_IO[columns_K] -= self.weight_nO
        change_times_hessian_IO = self.gram_II @ change_IO + self.ridge * change_IO
        self.damped_error = (change_times_hessian_IO * change_IO).sum(dtype=torch.float64)


class _Columns(_State):
    """Units of one column: thousands of removals, so the big matrices are only updated once per block.

    A column's score is |W_j|^2 / P_jj. A block is chosen among the few columns with the lowest scores at its start:
    only for these are P and M = W^T W kept up to date, and only by the terms that a removal adds (`choose`). Then P and
    W are updated for the whole block, and the same terms give the scores of all other columns at each step: if one of
    them would have been removed first, the block ends before that step, and the next block starts with it.
    """

    def __init__(self, dense_IO: Tensor, gram_II: Tensor, ridge: float, columns_per_unit: int) -> None:
        super().__init__(dense_IO, gram_II, ridge, columns_per_unit)
        self.candidates = _CANDIDATES

    def _first_inverse(self) -> Tensor:
        # An MLP's inputs nearly always allow float32, those of attention (several columns per unit) hardly ever.
        inverse_II = inverse_if_float32_suffices(self.gram_II, self.ridge)
        return super()._first_inverse() if inverse_II is None else inverse_II

    def remove(self, count: int) -> None:
        """Remove `count` more columns. Raises LinAlgError if P is not positive definite even after recomputation."""
        renewed = False
        while count > 0:
            removed = self._remove_block(-(-count // -(-count // BLOCK)))
            if removed == 0 and renewed:
                raise torch.linalg.LinAlgError("the inverse is not positive definite")  # type: ignore[attr-defined]
            renewed = removed == 0
            count -= removed
            if renewed:
                self.renew()

    def _remove_block(self, block: int) -> int:
        """Remove up to `block` columns and return their number; 0 if rounding has left P without a positive pivot."""
        inverse_n = self.inverse_nn.diagonal()
        squares_n = torch.linalg.vector_norm(self.weight_nO, dim=1).square_()
        candidates = min(max(_FEWEST, math.ceil(self.candidates * block)), self.units_left)
        among_D = self._lowest(squares_n / inverse_n, candidates)
        weight_DO = self.weight_nO.index_select(0, among_D)
        inverse_Dn = self.inverse_nn.index_select(0, among_D)
        chooser = choose if self.inverse_nn.device.type == "cpu" else _chooser(self.inverse_nn.device, candidates)
        chosen_B, scores_B, factor_BB = chooser(inverse_Dn.index_select(1, among_D), weight_DO @ weight_DO.T, block)
        steps = _sound_steps(scores_B, factor_BB)
        if steps == 0:
            return 0
        chosen_B, scores_B, factor_BB = chosen_B[:steps], scores_B[:steps], factor_BB[:steps, :steps]
        removed_B = among_D.index_select(0, chosen_B)

        # P_SS = L L^T. With u = L^-1 P_S and v = L^-1 W_S^T a removal changes P by -u u^T and W^T by -u v^T.
        u_Bn, v_BO = (_solve_lower(factor_BB, rows.index_select(0, chosen_B)) for rows in (inverse_Dn, weight_DO))
        if candidates < self.units_left and steps > 1:
            squares_n.index_fill_(0, among_D, torch.inf)
            others = self._steps_without_others(u_Bn, v_BO, scores_B, squares_n, inverse_n)
            if others < steps:
                self.candidates = _MORE * candidates / block
                removed_B, scores_B, u_Bn, v_BO = (rows[:others] for rows in (removed_B, scores_B, u_Bn, v_BO))
        self.apply(removed_B, u_Bn, v_BO)
        self.damped_error += scores_B.sum(dtype=torch.float64)
        return len(removed_B)

    def _lowest(self, score_n: Tensor, count: int) -> Tensor:
        """Return the indices of the lowest scores (ties: lowest units), in the order of the units."""
        by_unit_n = self.units_n.argsort()
        lowest_D = score_n.index_select(0, by_unit_n).sort(stable=True).indices[:count].sort().values
        return by_unit_n.index_select(0, lowest_D)

    def _steps_without_others(
        self, u_Bn: Tensor, v_BO: Tensor, scores_B: Tensor, squares_n: Tensor, inverse_n: Tensor
    ) -> int:
        """Return the number of first steps at which no column outside the candidates had a lower score than the one
        chosen.

        Step t subtracts `2 u_t W_t^T v_t - u_t^2 |v_t|^2` from the squares and `u_t^2` from the diagonal of P, where
        W_t is W minus the terms of the previous steps.
        """
        products_BB = v_BO @ v_BO.T
        scores_B1 = scores_B.to(u_Bn.dtype)[:, None]
        # At no step has a column changed by more than |u| times the largest singular value of v, which this power
        # bounds from above: most columns cannot get as low as the last one chosen. If the bound is NaN, all are
        # checked.
        size = products_BB.norm()
        norm = (torch.linalg.matrix_power(products_BB / size, 8).norm() ** (1 / 8) * size).sqrt()
        least_n = squares_n.sqrt() - norm * u_Bn.square().sum(0).sqrt_()
        asked_A = (~(least_n >= (scores_B1.max() * inverse_n).sqrt())).nonzero()[:, 0]
        if len(asked_A) == 0:
            return len(scores_B)
        u_BA, weight_AO = u_Bn.index_select(1, asked_A), self.weight_nO.index_select(0, asked_A)
        squares_A, inverse_A = squares_n.index_select(0, asked_A), inverse_n.index_select(0, asked_A)
        before_BB = products_BB.tril(-1).mul_(2).diagonal_scatter(products_BB.diagonal())
        drops_BA = (v_BO @ weight_AO.T).addmm_(before_BB, u_BA, beta=2, alpha=-1).mul_(u_BA)
        earlier_BB = torch.ones_like(products_BB).tril_(-1)
        # Difference between the squares and the chosen score times the diagonal of P, by one product.
        factors_BX = torch.cat([-earlier_BB, scores_B1 * earlier_BB, -scores_B1], dim=1)
        margins_BA = torch.addmm(squares_A, factors_BX, torch.cat([drops_BA, u_BA.square(), inverse_A[None]]))
        # The first step is correct by the choice of the candidates, even if rounding suggests otherwise.
        return max(1, _leading(~(margins_BA.amin(1) < 0)))


def _sound_steps(scores_B: Tensor, factor_BB: Tensor) -> int:
    """Return the number of first steps with a finite score and a positive pivot, whose square root is then finite."""
    return _leading((scores_B + factor_BB.diagonal()).isfinite())


def _leading(true_B: Tensor) -> int:
    """Return the number of leading true values, with one device synchronization."""
    return int(true_B.to(torch.uint8).cumprod(0, dtype=torch.long).sum())


def choose(inverse_DD: Tensor, squares_DD: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the next `block` of some columns in greedy order, from their parts of P and of M = W^T W.

    Of equal scores the first is chosen: the solver orders the columns by unit.

    Returns the chosen columns, their scores, and the Cholesky factor L of their P_SS, whose columns are terms below;
    above the diagonal it is zero up to rounding.

    Removing column s changes both by low-rank terms: `P - u u^T` with u = P_s / sqrt(P_ss), and `M - h u^T - u h^T`
    with g = M_s / sqrt(P_ss), h = g - (M_ss / P_ss) u / 2. So the two diagonals are enough to choose, and one row of P
    and of M is read per removal and corrected by the terms collected so far.

    For the CPU: a loop of small operations, dominated by call overhead, which is lowest in NumPy.
    """
    # Row s of both matrices side by side, and their diagonals; the squares are halved, since these change by -u h.
    start_d2d = np.stack([inverse_DD.numpy(), squares_DD.numpy()], axis=1)
    diagonals = np.stack([inverse_DD.numpy().diagonal(), squares_DD.numpy().diagonal() / 2])
    inverse_d, halves_d = diagonals
    # From the middle, rows u of the removals downwards and rows h upwards. So the terms so far are contiguous, and
    # their column s, reversed, has their factors in the same order.
    terms, largest = np.empty((2 * block, len(inverse_DD)), dtype=np.float32), np.finfo(np.float32).max
    rows, scratch = np.empty_like(diagonals), np.empty_like(diagonals)
    u_d, h_d = rows
    scratch_d, other_d = scratch
    factor = np.empty((), dtype=np.float32)
    chosen, scores = [], []
    with np.errstate(all="ignore"):
        for step in range(block):
            s = np.divide(halves_d, inverse_d, out=scratch_d).argmin()
            so_far = terms[block - step : block + step]
            at_s = so_far[:, s].copy()  # BLAS needs contiguous memory.
            at_s[step:].dot(so_far[step:], scratch_d)
            at_s[::-1].copy().dot(so_far, other_d)
            np.subtract(start_d2d[s], scratch, out=rows)
            # NumPy scalars, stored in an array for products: other scalars cost as much as the operation.
            pivot = u_d[s]
            score = h_d[s] / pivot
            factor[()] = pivot**-0.5
            np.multiply(rows, factor, out=rows)
            factor[()] = score / 2
            h_d -= np.multiply(u_d, factor, out=scratch_d)
            np.multiply(u_d, u_d, out=scratch_d)
            np.multiply(h_d, u_d, out=other_d)
            diagonals -= scratch
            terms[block + step], terms[block - 1 - step] = u_d, h_d
            # Rounding errors of the removed column must not make this value, or a score, negative.
            inverse_d[s], halves_d[s] = largest, np.inf
            chosen.append(s)
            scores.append(score)
    columns_BB = torch.from_numpy(terms[block:, chosen])
    return torch.from_numpy(np.array(chosen)), torch.from_numpy(np.array(scores, dtype=np.float64)), columns_BB.T


def _chooser(device: torch.device, candidates: int) -> _Choose:
    """Return the fastest way to choose a block on an accelerator: one launch with Triton, otherwise about 24 per
    removal."""
    kernel = _kernel(device.type)
    return choose_without_waiting if kernel is None or candidates > kernel.LARGEST else kernel.choose_at_once


@functools.lru_cache
def _kernel(device_type: str) -> ModuleType | None:
    """Import the kernel module if Triton works on this device."""
    if device_type != "cuda":
        return None
    try:
        kernel = importlib.import_module("darwinlm.database.kernel")
        one = torch.ones(1, 1, device=device_type)
        kernel.choose_at_once(one, one, 1)
    except ImportError:
        return None
    except Exception as error:  # No C compiler, an old GPU, another version: many kinds of errors.
        log.warning(
            "Triton does not work here (%s): falling back to slower PyTorch operations to choose columns", error
        )
        return None
    return kernel


def choose_without_waiting(inverse_DD: Tensor, squares_DD: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Do the same as `choose` on an accelerator without Triton: `s` is a tensor, and the loop never synchronizes."""
    terms_BD = inverse_DD.new_empty(2 * block, len(inverse_DD))
    inverse_D, squares_D = inverse_DD.diagonal().clone(), squares_DD.diagonal().clone()
    score_D = torch.empty_like(inverse_D)
    chosen_B = torch.empty(block, dtype=torch.long, device=inverse_DD.device)
    scores_B = inverse_DD.new_empty(block)
    for step in range(block):
        s = torch.div(squares_D, inverse_D, out=score_D).argmin().view(1)
        terms, u_D, h_D = terms_BD[: 2 * step], terms_BD[2 * step], terms_BD[2 * step + 1]
        at_s = terms.index_select(1, s)[:, 0]
        torch.addmv(inverse_DD.index_select(0, s)[0], terms[::2].T, at_s[::2], alpha=-1, out=u_D)
        swapped = at_s.view(-1, 2).flip(1).view(-1)
        torch.addmv(squares_DD.index_select(0, s)[0], terms.T, swapped, alpha=-1, out=h_D)
        pivot, square = u_D.index_select(0, s), h_D.index_select(0, s)
        scale = pivot.rsqrt()
        u_D.mul_(scale)
        h_D.mul_(scale).sub_(u_D * (0.5 * square / pivot))
        inverse_D.addcmul_(u_D, u_D, value=-1)
        squares_D.addcmul_(u_D, h_D, value=-2)
        squares_D.index_fill_(0, s, torch.inf)
        inverse_D.index_fill_(0, s, torch.finfo(torch.float32).max)
        chosen_B[step : step + 1] = s
        scores_B[step : step + 1] = square / pivot
    return chosen_B, scores_B, terms_BD[::2].index_select(1, chosen_B).T


class _Blocks(_State):
    """Units of several columns (heads): few removals, each a sizable matrix product."""

    def remove(self, count: int) -> None:
        """Remove `count` more units."""
        C = self.C
        for _ in range(count):
            U = len(self.units_n)
            blocks_UCC = self.inverse_nn.view(U, C, U, C).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            factors_UCC = torch.linalg.cholesky(blocks_UCC)
            weight_UCO = self.weight_nO.view(U, C, -1)
            scores_U = torch.linalg.solve_triangular(factors_UCC, weight_UCO, upper=False).square().sum(dim=(1, 2))
            by_unit_U = self.units_n.argsort()
            unit = by_unit_U.index_select(0, scores_U.index_select(0, by_unit_U).argmin().view(1))
            columns_C, factor_CC = _columns_of(unit, C), factors_UCC.index_select(0, unit)[0]
            rows_Cn, weight_CO = (matrix.index_select(0, columns_C) for matrix in (self.inverse_nn, self.weight_nO))
            u_Cn, v_CO = (_solve_lower(factor_CC, rows) for rows in (rows_Cn, weight_CO))
            self.apply(unit, u_Cn, v_CO)
            self.damped_error += scores_U.index_select(0, unit)[0]


@functools.lru_cache(maxsize=1)
def _numpy_threads() -> ThreadpoolController:
    return ThreadpoolController().select(internal_api="openblas")


def _solve_lower(factor_BB: Tensor, rows_Bn: Tensor) -> Tensor:
    """Return L^-1 X for a lower triangular L, computed as (X^T L^-T)^T, which avoids copies."""
    solved_nB: Tensor = torch.linalg.solve_triangular(factor_BB.T, rows_Bn.T, upper=True, left=False)
    return solved_nB.T


def _columns_of(units_U: Tensor, columns_per_unit: int) -> Tensor:
    if columns_per_unit == 1:
        return units_U
    return (units_U[:, None] * columns_per_unit + torch.arange(columns_per_unit, device=units_U.device)).flatten()
