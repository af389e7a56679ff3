"""Inverse of the damped Gram matrix, in float32 if that is accurate enough.

Dimension letters: I columns of the Gram matrix, K some of them, n columns of a part, R random probes, X any rows.
"""

import torch
from torch import Tensor

from darwinlm.database.symmetric import add_symmetric, mirror

_INVERSE_ERROR = 1e-4
"""Maximum relative error of the inverse's entries for which float32 is accepted."""
_LEAST_RIDGE = 1e-8
"""Ridge for inputs that are always zero. Any value would do, but rounding turns this share of the squared weights into
error."""
_PROBES = 8
_LEAF, _LEAF_ON_ACCELERATORS = 96, 512
"""Maximum size inverted by Cholesky directly: recursion is faster on a CPU, but needs more kernel launches."""
_PADDING = 16
"""Columns that pad the leading dimension of a big matrix, to avoid cache-set conflicts of rows a power of two apart."""


def damping_ridge(gram_II: Tensor, damping: float) -> float:
    """Return the addend of the diagonal: damping * mean(diag G), or a small value if the inputs are always zero."""
    mean = gram_II.diagonal().double().mean().item()
    return damping * mean if mean > 0 else _LEAST_RIDGE


def damped_inverse(gram_II: Tensor, ridge: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return (G + ridge * I)^-1 in float32, computed in `dtype`, with memory for one such matrix and a quarter of
    another."""
    work_II = _padded(gram_II, dtype)
    work_II.diagonal().add_(ridge)
    _invert(work_II)
    return work_II if dtype == torch.float32 else _padded(work_II, torch.float32)


def _padded(matrix_II: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy a matrix with a padded leading dimension."""
    size = len(matrix_II)
    return torch.empty(size, size + _PADDING, dtype=dtype, device=matrix_II.device)[:, :size].copy_(matrix_II)


def inverse_if_float32_suffices(gram_II: Tensor, ridge: float) -> Tensor | None:
    """Return (G + ridge * I)^-1 computed in float32, or None if rounding errors are too large.

    With Q for the inverse P and random z, Q (z - H Q z) is (P - Q) z up to the square of the error. Errors are measured
    like entries of a correlation matrix, relative to the square roots of Q's diagonal, because scores are divided by
    it.
    """
    try:
        inverse_II = damped_inverse(gram_II, ridge, torch.float32)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    generator = torch.Generator().manual_seed(0)
    scale_I = inverse_II.diagonal().rsqrt()
    z_RI = torch.randn(_PROBES, len(gram_II), generator=generator).to(gram_II.device) * scale_I
    solved_RI = times(z_RI, inverse_II)
    error_RI = times(z_RI - times(solved_RI, gram_II) - ridge * solved_RI, inverse_II) * scale_I
    return inverse_II if error_RI.square().mean().sqrt().item() < _INVERSE_ERROR else None


def times(rows_XI: Tensor, symmetric_KI: Tensor) -> Tensor:
    """Return X S^T for a few rows. Computed as (S X^T)^T with contiguous rows, it is up to three times as fast on a
    CPU."""
    return (symmetric_KI @ rows_XI.contiguous().T).T


def _invert(matrix_nn: Tensor) -> None:
    """Invert a positive definite matrix in place, recursively by halves, which is mostly matrix products.

    With quarters A, B, D (B above the diagonal) and S = D - B^T A^-1 B, the inverse has the quarters S^-1 for D, -A^-1
    B S^-1 for B, and A^-1 + A^-1 B S^-1 B^T A^-1 for A. The part below the diagonal is not read.
    """
    if len(matrix_nn) <= (_LEAF if matrix_nn.device.type == "cpu" else _LEAF_ON_ACCELERATORS):
        identity_nn = torch.eye(len(matrix_nn), dtype=matrix_nn.dtype, device=matrix_nn.device)
        factor_nn = torch.linalg.cholesky(matrix_nn, upper=True)
        root_nn = torch.linalg.solve_triangular(factor_nn, identity_nn, upper=True)
        torch.mm(root_nn, root_nn.T, out=matrix_nn)
        return
    half = len(matrix_nn) // 2
    A, B, D = matrix_nn[:half, :half], matrix_nn[:half, half:], matrix_nn[half:, half:]
    _invert(A)
    product = A @ B
    add_symmetric(D, B.T, product, alpha=-1)
    _invert(D)
    torch.mm(product, D, out=B).neg_()
    add_symmetric(A, B, product.T, alpha=-1)
    mirror(A)
    matrix_nn[half:, :half] = B.T
