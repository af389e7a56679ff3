"""Symmetric matrix products: only computed on and above the diagonal, in strips, then mirrored.

Dimension letters: n rows and columns of the matrix, k terms of the product.
"""

from torch import Tensor

_LEAST, _LEAST_ON_ACCELERATORS = 192, 1024
"""Minimum rows per strip: accelerators need larger operations."""


def add_symmetric(matrix_nn: Tensor, one_nk: Tensor, other_kn: Tensor, alpha: float = 1) -> None:
    """Add `alpha` times a symmetric product, above and only slightly below the diagonal."""
    for strip in _strips(matrix_nn):
        matrix_nn[strip, strip.start :].addmm_(one_nk[strip], other_kn[:, strip.start :], alpha=alpha)


def mirror(matrix_nn: Tensor) -> None:
    """Copy the upper triangle below the diagonal, after `add_symmetric`."""
    for strip in _strips(matrix_nn):
        matrix_nn[strip.stop :, strip] = matrix_nn[strip, strip.stop :].T


def _strips(matrix_nn: Tensor) -> list[slice]:
    size = len(matrix_nn)
    width = max(_LEAST if matrix_nn.device.type == "cpu" else _LEAST_ON_ACCELERATORS, size // 16)
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]
