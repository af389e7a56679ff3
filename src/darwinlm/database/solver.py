"""Second-order structured pruning: which units go, in which order, and what the others make up for (paper, section 3).

Removing the columns S of a unit from W, all others refitted, adds `tr(W_S (P_SS)^-1 W_S^T)` to the squared output error
(score), where P is the inverse of the damped Gram matrix H; it moves `W <- W - W_S (P_SS)^-1 P_S` (refit) and
`P <- P - P_S^T (P_SS)^-1 P_S` (shrink). `docs/method.md` derives how that is done in blocks, without another outcome.

Dimension letters: O output rows, I input columns, U units, C columns of a unit, K kept columns, n columns in the
working matrices, F of them that move, B removals in a block, D columns it is chosen from, R random probes, X any rows.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

BLOCK = 256
"""Removals between two updates of the big matrices, at most."""
_CANDIDATES, _FEWEST = 1.5, 32
"""Columns that a block is chosen from: so many for each that goes, and at least so many."""
_MORE = 1.5
"""Times as many as there were for each that goes, from then on, where they did not suffice for all of a block."""
_EXCESS = 2e-4
"""Share of a level's error that rounding may add to it before the inverse is computed anew."""
_INVERSE_ERROR = 1e-4
"""Relative error of the inverse's entries up to which float32 suffices."""
_LEAST_RIDGE = 1e-8
"""Of inputs that are always zero. Any would do, but rounding turns this share of the weights' squares into error."""
_PROBES = 8
_LEAF = 192
"""Size below which a Cholesky factorisation inverts faster than products of halves."""
_TILE = 512
"""Size below which a symmetric product as a whole is faster than its upper half in parts."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A site at one level."""

    kept: tuple[int, ...]
    """Unit indices, ascending."""
    weight_OK: Tensor
    """The output projection's surviving columns, refitted: float32."""
    error: float
    """tr(dW G dW^T), without the damping."""


def damping_ridge(gram_II: Tensor, damping: float) -> float:
    """What is added to the diagonal: damping * mean(diag G), or a little where the inputs are always zero."""
    mean = gram_II.diagonal().double().mean().item()
    return damping * mean if mean > 0 else _LEAST_RIDGE


@torch.no_grad()
def prune_site(
    weight_OI: Tensor, gram_II: Tensor, *, columns_per_unit: int, sizes: Sequence[int], damping: float
) -> list[Snapshot]:
    """Remove units one by one, always the one whose removal costs least, and keep a snapshot at each size.

    All is float32 and watched. Where random probes find the inverse not good enough, it is computed in float64; at each
    snapshot others estimate by how much rounding has raised the error, and where that matters, inverse and refit are
    computed anew.

    Args:
        weight_OI: the dense output projection.
        gram_II: the Gram matrix G of its inputs, float32.
        columns_per_unit: unit u owns columns u*C to u*C + C - 1.
        sizes: units kept at each snapshot, descending; neither all nor none of them.
        damping: lambda in H = G + lambda * mean(diag G) * I.

    Returns:
        One snapshot for each of `sizes`.
    """
    if weight_OI.device.type == "mps":  # has no float64
        weight_OI, gram_II = weight_OI.cpu(), gram_II.cpu()
    weight_OI = weight_OI.float()
    ridge = damping_ridge(gram_II, damping)
    state = (_Columns if columns_per_unit == 1 else _Blocks)(weight_OI, gram_II, ridge, columns_per_unit)
    total = weight_OI.square().sum()
    snapshots = []
    for size in sizes:
        state.remove(state.units_left - size)
        units_U, weight_OK = state.refitted()
        columns_K = _columns_of(units_U, columns_per_unit)
        dense_OK = weight_OI.index_select(1, columns_K)
        moved = (total - dense_OK.square().sum()).double() + (dense_OK - weight_OK).square().sum()
        error = max(0.0, (state.damped_error - ridge * moved).item())
        snapshots.append(Snapshot(tuple(units_U.tolist()), weight_OK, error))
    return snapshots


def removal_error(weight_OI: Tensor, gram_II: Tensor) -> float:
    """tr(W G W^T): the error of removing the whole site."""
    weight_OI = weight_OI.float()
    return max(0.0, ((weight_OI @ gram_II) * weight_OI).sum().item())


def damped_inverse(gram_II: Tensor, ridge: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """(G + ridge * I)^-1 in float32, computed in `dtype`, which takes one such matrix and a quarter of another."""
    work_II = gram_II.to(dtype, copy=True)
    work_II.diagonal().add_(ridge)
    _invert(work_II)
    return work_II.float()


def _inverse_if_float32_suffices(gram_II: Tensor, ridge: float) -> Tensor | None:
    """(G + ridge * I)^-1 computed in float32, or None where rounding has spoilt it.

    With Q for the inverse P and z random, Q (z - H Q z) is (P - Q) z but for the square of the error. Its entries are
    measured as those of a correlation matrix, by the roots of Q's diagonal: scores are quotients by that.
    """
    try:
        inverse_II = damped_inverse(gram_II, ridge, torch.float32)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    generator = torch.Generator().manual_seed(0)
    scale_I = inverse_II.diagonal().rsqrt()
    z_RI = torch.randn(_PROBES, len(gram_II), generator=generator).to(gram_II.device) * scale_I
    solved_RI = _times(z_RI, inverse_II)
    error_RI = _times(z_RI - _times(solved_RI, gram_II) - ridge * solved_RI, inverse_II) * scale_I
    return inverse_II if error_RI.square().mean().sqrt().item() < _INVERSE_ERROR else None


def _times(rows_XI: Tensor, symmetric_II: Tensor) -> Tensor:
    """X S for a few rows: as (S X^T)^T it is up to three times as fast on a CPU."""
    return (symmetric_II @ rows_XI.T).T


def _invert(matrix_nn: Tensor) -> None:
    """Invert a positive definite matrix in place, by halves: nearly all of it is matrix products.

    With A, B, D the quarters (B above the diagonal) and S = D - B^T A^-1 B, the inverse has S^-1 below,
    -A^-1 B S^-1 beside it, and A^-1 + A^-1 B S^-1 B^T A^-1 above. What lies below the diagonal is not read.
    """
    if len(matrix_nn) <= _LEAF:
        identity_nn = torch.eye(len(matrix_nn), dtype=matrix_nn.dtype, device=matrix_nn.device)
        factor_nn = torch.linalg.cholesky(matrix_nn, upper=True)
        root_nn = torch.linalg.solve_triangular(factor_nn, identity_nn, upper=True)
        torch.mm(root_nn, root_nn.T, out=matrix_nn)
        return
    half = len(matrix_nn) // 2
    A, B, D = matrix_nn[:half, :half], matrix_nn[:half, half:], matrix_nn[half:, half:]
    _invert(A)
    product = A @ B
    _subtract_symmetric(D, B.T, product)
    _invert(D)
    torch.mm(product, D, out=B).neg_()
    _subtract_symmetric(A, B, product.T)
    _mirror(A)
    matrix_nn[half:, :half] = B.T


def _subtract_symmetric(matrix_nn: Tensor, one_nk: Tensor, other_kn: Tensor) -> None:
    """Take a product that is symmetric off a matrix: down to `_TILE`, only off what lies above the diagonal."""
    if len(matrix_nn) <= _TILE:
        matrix_nn.addmm_(one_nk, other_kn, alpha=-1)
        return
    half = len(matrix_nn) // 2
    matrix_nn[:half, half:].addmm_(one_nk[:half], other_kn[:, half:], alpha=-1)
    _subtract_symmetric(matrix_nn[:half, :half], one_nk[:half], other_kn[:, :half])
    _subtract_symmetric(matrix_nn[half:, half:], one_nk[half:], other_kn[:, half:])


def _mirror(matrix_nn: Tensor) -> None:
    """Below the diagonal what is above it, where `_subtract_symmetric` has left that out."""
    if len(matrix_nn) > _TILE:
        half = len(matrix_nn) // 2
        matrix_nn[half:, :half] = matrix_nn[:half, half:].T
        _mirror(matrix_nn[:half, :half])
        _mirror(matrix_nn[half:, half:])


class _State:
    """A site on its way: `weight_nO` and `inverse_nn` hold the columns that are left, in an order of their own."""

    def __init__(self, weight_OI: Tensor, gram_II: Tensor, ridge: float, columns_per_unit: int) -> None:
        self.C = columns_per_unit
        self.dense_OI, self.gram_II, self.ridge = weight_OI, gram_II, ridge
        self.units_n = torch.arange(weight_OI.shape[1] // columns_per_unit, device=weight_OI.device)
        """Units that are left, in the matrices' order."""
        self.weight_nO = weight_OI.T.clone(memory_format=torch.contiguous_format)
        """Transposed, so that columns of the projection are moved as rows."""
        self.inverse_nn = self._first_inverse()
        self.damped_error = torch.zeros((), dtype=torch.float64, device=weight_OI.device)
        """tr(dW H dW^T): the sum of the scores of all removals so far."""
        generator = torch.Generator().manual_seed(0)
        signs_RO = torch.randint(0, 2, (_PROBES, len(weight_OI)), generator=generator) * 2 - 1
        self.signs_RO = signs_RO.to(weight_OI.device, torch.float32)
        self.target_RI = self._times_hessian(self.signs_RO @ weight_OI, slice(None))

    @property
    def units_left(self) -> int:
        return len(self.units_n)

    def _first_inverse(self) -> Tensor:
        return damped_inverse(self.gram_II, self.ridge)

    def take_out(self, gone_B: Tensor, rows_Xn: Tensor) -> Tensor:
        """Take units out of the matrices and out of some rows over their columns, which are returned.

        The last units that are left take their places, and the matrices are narrowed, in place.
        """
        left = self.units_left - len(gone_B)
        stays = torch.ones(self.units_left - left, dtype=torch.bool, device=gone_B.device)
        stays[gone_B[gone_B >= left] - left] = False
        holes_U, fillers_U = gone_B[gone_B < left], left + stays.nonzero()[:, 0]
        holes, fillers = _columns_of(holes_U, self.C), _columns_of(fillers_U, self.C)
        size = left * self.C
        rows_Fn = self.inverse_nn.index_select(0, fillers)
        rows_Fn[:, holes] = rows_Fn[:, fillers]
        self.inverse_nn[holes] = rows_Fn
        self.inverse_nn[:, holes] = rows_Fn.T
        self.weight_nO[holes] = self.weight_nO[fillers]
        self.units_n[holes_U] = self.units_n[fillers_U]
        self.inverse_nn = self.inverse_nn[:size, :size]
        self.weight_nO = self.weight_nO[:size]
        self.units_n = self.units_n[:left]
        rows_Xn[:, holes] = rows_Xn[:, fillers]
        return rows_Xn[:, :size]

    def refitted(self) -> tuple[Tensor, Tensor]:
        """The units that are left, ascending, and their refitted columns, after a look at what rounding has done."""
        if self._excess() > _EXCESS * self.damped_error.item():
            self.renew()
        units_U, order_U = self.units_n.sort()
        return units_U, self.weight_nO.index_select(0, _columns_of(order_U, self.C)).T

    def _times_hessian(self, rows_RI: Tensor, columns: Tensor | slice) -> Tensor:
        return _times(rows_RI, self.gram_II)[:, columns] + self.ridge * rows_RI[:, columns]

    def _residual(self, columns_K: Tensor) -> Tensor:
        """W_K H_KK - (W H)_K for the probes' random sums of rows: zero where the refit is exact."""
        rows_RI = torch.zeros_like(self.target_RI)
        rows_RI[:, columns_K] = (self.weight_nO @ self.signs_RO.T).T
        return self._times_hessian(rows_RI, columns_K) - self.target_RI[:, columns_K]

    def _excess(self) -> float:
        """By how much the error exceeds that of the exact refit: tr(R P R^T) of the residual R, from random probes."""
        residual_RK = self._residual(_columns_of(self.units_n, self.C))
        return (_times(residual_RK, self.inverse_nn) * residual_RK).sum().item() / _PROBES

    def renew(self) -> None:
        """Inverse, refit and error from the Gram matrix."""
        columns_K = _columns_of(self.units_n, self.C)
        self.inverse_nn = damped_inverse(self.gram_II[columns_K][:, columns_K], self.ridge)
        target_OK = self._times_hessian(self.dense_OI, columns_K)
        self.weight_nO = self.inverse_nn @ target_OK.T
        change_OI = self.dense_OI.clone()
        change_OI[:, columns_K] -= self.weight_nO.T
        self.damped_error = (self._times_hessian(change_OI, slice(None)) * change_OI).sum(dtype=torch.float64)


class _Columns(_State):
    """Units of one column: thousands of removals, so the big matrices are touched once a block.

    A column's score is |W_j|^2 / P_jj. A block is chosen among the few columns with the lowest scores at its start: of
    these alone P and M = W^T W are kept up to date, and only by the terms that a removal adds (`choose`). Then P and W
    take the whole block at once, and the scores that all other columns had at each step are known from the same terms:
    where one of them would have gone first, the block ends before that step, and the next begins with it.
    """

    def __init__(self, weight_OI: Tensor, gram_II: Tensor, ridge: float, columns_per_unit: int) -> None:
        super().__init__(weight_OI, gram_II, ridge, columns_per_unit)
        self.candidates = _CANDIDATES

    def _first_inverse(self) -> Tensor:
        # An MLP's inputs nearly always allow it, those of attention, whose units have several columns, hardly ever.
        inverse_II = _inverse_if_float32_suffices(self.gram_II, self.ridge)
        return super()._first_inverse() if inverse_II is None else inverse_II

    def remove(self, count: int) -> None:
        """Remove `count` more columns. Raises LinAlgError if P is not positive definite, however computed."""
        anew = False
        while count > 0:
            removed = self._remove_block(-(-count // -(-count // BLOCK)))
            if removed == 0 and anew:
                raise torch.linalg.LinAlgError("the inverse is not positive definite")  # type: ignore[attr-defined]
            anew = removed == 0
            count -= removed
            if anew:
                self.renew()

    def _remove_block(self, block: int) -> int:
        """Remove up to `block` columns; how many. None if rounding has left P without a positive pivot."""
        inverse_n = self.inverse_nn.diagonal()
        squares_n = torch.linalg.vector_norm(self.weight_nO, dim=1).square_()
        candidates = min(max(_FEWEST, math.ceil(self.candidates * block)), self.units_left)
        among_D = (squares_n / inverse_n).topk(candidates, largest=False).indices.sort().values
        weight_DO = self.weight_nO.index_select(0, among_D)
        inverse_Dn = self.inverse_nn.index_select(0, among_D)
        on_cpu = self.inverse_nn.device.type == "cpu"
        chosen_B, scores_B = (choose if on_cpu else choose_without_waiting)(
            inverse_Dn.index_select(1, among_D), weight_DO @ weight_DO.T, block
        )
        inverse_BB = inverse_Dn.index_select(0, chosen_B).index_select(1, among_D.index_select(0, chosen_B))
        factor_BB, failed_at = torch.linalg.cholesky_ex(inverse_BB)
        steps = _sound_steps(scores_B, failed_at)
        if steps == 0:
            return 0
        chosen_B, scores_B, factor_BB = chosen_B[:steps], scores_B[:steps], factor_BB[:steps, :steps]
        removed_B = among_D.index_select(0, chosen_B)

        # P_SS = L L^T. With u = L^-1 P_S and v = L^-1 W_S^T a removal changes P by -u u^T and W^T by -u v^T.
        identity_BB = torch.eye(steps, dtype=factor_BB.dtype, device=factor_BB.device)
        root_BB = torch.linalg.solve_triangular(factor_BB, identity_BB, upper=False)
        u_Bn, v_BO = root_BB @ inverse_Dn.index_select(0, chosen_B), root_BB @ weight_DO.index_select(0, chosen_B)
        if candidates < self.units_left and steps > 1:
            squares_n.index_fill_(0, among_D, torch.inf)
            others = self._steps_without_others(u_Bn, v_BO, scores_B, squares_n, inverse_n)
            if others < steps:
                self.candidates = _MORE * candidates / block
                removed_B, scores_B, u_Bn, v_BO = (rows[:others] for rows in (removed_B, scores_B, u_Bn, v_BO))
        u_BK = self.take_out(removed_B, u_Bn)
        self.weight_nO.addmm_(u_BK.T, v_BO, alpha=-1)
        self.inverse_nn.addmm_(u_BK.T, u_BK, alpha=-1)
        self.damped_error += scores_B.sum(dtype=torch.float64)
        return len(removed_B)

    def _steps_without_others(
        self, u_Bn: Tensor, v_BO: Tensor, scores_B: Tensor, squares_n: Tensor, inverse_n: Tensor
    ) -> int:
        """At how many of the first steps no column that was not a candidate had a lower score than the one chosen.

        Step t takes `2 u_t W_t^T v_t - u_t^2 |v_t|^2` off the squares and `u_t^2` off the diagonal of P, where W_t is W
        less the terms of the steps before.
        """
        products_BB = v_BO @ v_BO.T
        before_BB = products_BB.tril(-1).mul_(2).diagonal_scatter(products_BB.diagonal())
        drops_Bn = (v_BO @ self.weight_nO.T).addmm_(before_BB, u_Bn, beta=2, alpha=-1).mul_(u_Bn)
        earlier_BB = torch.ones_like(products_BB).tril_(-1)
        scores_B1 = scores_B.to(u_Bn.dtype)[:, None]
        # By how much squares exceed what the chosen score times the diagonal of P would be: one product.
        factors_BX = torch.cat([-earlier_BB, scores_B1 * earlier_BB, -scores_B1], dim=1)
        margins_Bn = torch.addmm(squares_n, factors_BX, torch.cat([drops_Bn, u_Bn.square(), inverse_n[None]]))
        overtaken = (margins_Bn.amin(1) < 0).nonzero()
        # The first step is right by choice of the candidates; rounding may say otherwise.
        return max(1, int(overtaken[0])) if len(overtaken) else len(scores_B)


def _sound_steps(scores_B: Tensor, failed_at: Tensor) -> int:
    """How many of the first steps had a finite score and a positive pivot; the factorisation failed at that order."""
    order = int(failed_at)
    unsound = (~scores_B.isfinite()).nonzero()
    return min(order - 1 if order > 0 else len(scores_B), int(unsound[0]) if len(unsound) else len(scores_B))


def choose(inverse_DD: Tensor, squares_DD: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The next `block` of some columns in greedy order, and their scores, from their parts of P and of M = W^T W.

    Removing column s changes both by low-rank terms: `P - u u^T` with u = P_s / sqrt(P_ss), and `M - h u^T - u h^T`
    with g = M_s / sqrt(P_ss), h = g - (M_ss / P_ss) u / 2. So the two diagonals are enough to choose, and one row of P
    and of M is read per removal and corrected by the terms collected so far.

    For the CPU: a loop of small operations, whose time is the calls, and those are cheapest in NumPy. On one thread,
    since NumPy's own threads would keep PyTorch's from running.
    """
    # Row s of both matrices side by side, and their diagonals, the squares' halved: these change by -u h.
    start_d2d = np.stack([inverse_DD.numpy(), squares_DD.numpy()], axis=1)
    diagonals = np.stack([inverse_DD.numpy().diagonal(), squares_DD.numpy().diagonal() / 2])
    inverse_d, halves_d = diagonals
    # From the middle, rows u of the removals downwards and rows h upwards. So the terms so far are one piece, and its
    # column s, read backwards, has their factors in the same order.
    terms, largest = np.empty((2 * block, len(inverse_DD)), dtype=np.float32), np.finfo(np.float32).max
    rows, scratch = np.empty_like(diagonals), np.empty_like(diagonals)
    u_d, h_d = rows
    scratch_d, other_d = scratch
    chosen, scores = [], []
    with _numpy_threads().limit(limits=1), np.errstate(all="ignore"):
        for step in range(block):
            s = np.divide(halves_d, inverse_d, out=scratch_d).argmin()
            so_far = terms[block - step : block + step]
            at_s = so_far[:, s].copy()  # BLAS takes no other
            np.dot(at_s[step:], so_far[step:], out=scratch_d)
            np.dot(at_s[::-1].copy(), so_far, out=other_d)
            np.subtract(start_d2d[s], scratch, out=rows)
            # NumPy's own numbers: a Python float costs as much as the operation.
            pivot = u_d[s]
            score = h_d[s] / pivot
            rows *= 1 / np.sqrt(pivot)
            h_d -= np.multiply(u_d, score / 2, out=scratch_d)
            diagonals -= np.multiply(rows, u_d, out=scratch)
            terms[block + step], terms[block - 1 - step] = u_d, h_d
            # What rounding leaves of it cannot turn this, or a score, negative.
            inverse_d[s], halves_d[s] = largest, np.inf
            chosen.append(s)
            scores.append(score)
    return torch.from_numpy(np.array(chosen)), torch.from_numpy(np.array(scores, dtype=np.float64))


def choose_without_waiting(inverse_DD: Tensor, squares_DD: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The same for an accelerator: `s` is a tensor, and nothing in the loop waits for its value."""
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
    return chosen_B, scores_B


class _Blocks(_State):
    """Units of several columns, heads: few removals, each of which fills a matrix product by itself."""

    def remove(self, count: int) -> None:
        """Remove `count` more units."""
        C = self.C
        for _ in range(count):
            U = len(self.units_n)
            blocks_UCC = self.inverse_nn.view(U, C, U, C).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            factors_UCC = torch.linalg.cholesky(blocks_UCC)
            weight_UCO = self.weight_nO.view(U, C, -1)
            scores_U = torch.linalg.solve_triangular(factors_UCC, weight_UCO, upper=False).square().sum(dim=(1, 2))
            unit = scores_U.argmin().view(1)
            columns_C, factor_CC = _columns_of(unit, C), factors_UCC.index_select(0, unit)[0]
            rows_Cn, weight_CO = (matrix.index_select(0, columns_C) for matrix in (self.inverse_nn, self.weight_nO))
            u_Cn, v_CO = (torch.linalg.solve_triangular(factor_CC, rows, upper=False) for rows in (rows_Cn, weight_CO))
            u_CK = self.take_out(unit, u_Cn)
            self.weight_nO.addmm_(u_CK.T, v_CO, alpha=-1)
            self.inverse_nn.addmm_(u_CK.T, u_CK, alpha=-1)
            self.damped_error += scores_U.index_select(0, unit)[0]


@functools.lru_cache(maxsize=1)
def _numpy_threads() -> ThreadpoolController:
    return ThreadpoolController().select(internal_api="openblas")


def _columns_of(units_U: Tensor, columns_per_unit: int) -> Tensor:
    if columns_per_unit == 1:
        return units_U
    return (units_U[:, None] * columns_per_unit + torch.arange(columns_per_unit, device=units_U.device)).flatten()
