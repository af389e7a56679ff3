"""CUDA kernel that chooses the columns of a block: `solver.choose` in a single launch.

Dimension letters as in `solver`: D columns a block is chosen from, B removals in it. Only the solver imports this
module, and only if Triton is available: it comes with PyTorch's CUDA builds for Linux, and nothing else needs it.

One program chooses one block. Each removal depends on the previous one, so only columns are processed in parallel, and
those of a block keep the threads of one multiprocessor busy. The two diagonals stay in registers. The candidates' parts
of P and M (1.2 MB for 384 columns) and the previous terms (0.8 MB for 256 removals) exceed a multiprocessor's memory
and are read from the L2 cache: 4 B^2 D bytes per block in total, 100 MB for these sizes.

`tl.dot` is not used: all products are float32 multiplications and additions, never TF32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 8192
"""Maximum number of candidates per program; more columns would not fit in its registers."""
_TILE = 8192
"""Number of terms read at a time: rows times columns."""
_LINE = 32
"""Alignment of the rows of terms, in elements, for vectorized reads."""
_SMALLEST = 256
"""Minimum number of columns that the kernel is compiled for; each larger power of two is compiled once."""


def choose_at_once(inverse_DD: Tensor, squares_DD: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the next `block` of at most `LARGEST` columns; returns the same as `solver.choose`."""
    D = len(inverse_DD)
    width, size = triton.cdiv(D, _LINE) * _LINE, max(_SMALLEST, triton.next_power_of_2(D))
    inverse_DD, squares_DD = inverse_DD.contiguous(), squares_DD.contiguous()
    terms_B2W = inverse_DD.new_empty(block, 2, width)
    chosen_B = torch.empty(block, dtype=torch.long, device=inverse_DD.device)
    scores_B = inverse_DD.new_empty(block)
    with torch.cuda.device_of(inverse_DD):  # Triton launches on the current device, regardless of the tensors' device.
        _choose[(1,)](
            inverse_DD, squares_DD, terms_B2W, chosen_B, scores_B, D, width, block,
            SIZE=size, ROWS=_TILE // size, num_warps=16, enable_fp_fusion=True,
        )  # fmt: skip
    return chosen_B, scores_B, terms_B2W[:, 0].index_select(1, chosen_B).T


@triton.jit(do_not_specialize=["columns", "block"])
def _choose(
    inverse_ptr, squares_ptr, terms_ptr, chosen_ptr, scores_ptr, columns, width, block,
    SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Choose one block. Row t of the terms is u_t and then h_t, each of length `width`; entries beyond `columns` are
    zero."""
    d = tl.arange(0, SIZE)
    rows = tl.arange(0, ROWS)
    inside = d < columns
    inverse = tl.load(inverse_ptr + d * (columns + 1), mask=inside, other=3.4028234663852886e38)
    # Half of the squares, which change by -u h.
    halves = 0.5 * tl.load(squares_ptr + d * (columns + 1), mask=inside, other=float("inf"))
    for step in range(block):
        # IEEE division, as in the other loops: an approximate one could create ties.
        score = tl.div_rn(halves, inverse)
        # NaN is chosen first, as in NumPy and PyTorch; the block ends there.
        score = tl.where(score == score, score, float("-inf"))
        # First of the lowest scores. `tl.argmin` is avoided, because the interpreter breaks its ties differently.
        s = tl.min(tl.where(score == tl.min(score, 0), d, SIZE - 1), 0)

        u = tl.load(inverse_ptr + s * columns + d, mask=inside, other=0.0)
        h = tl.load(squares_ptr + s * columns + d, mask=inside, other=0.0)
        u_terms = tl.zeros([ROWS, SIZE], dtype=tl.float32)
        h_terms = tl.zeros([ROWS, SIZE], dtype=tl.float32)
        for first in range(0, step, ROWS):
            earlier = first + rows < step
            row_ptr = terms_ptr + (first + rows) * (2 * width)
            u_at_s = tl.load(row_ptr + s, mask=earlier, other=0.0)
            h_at_s = tl.load(row_ptr + width + s, mask=earlier, other=0.0)
            wanted = earlier[:, None] & (d < width)[None, :]
            u_rows = tl.load(row_ptr[:, None] + d[None, :], mask=wanted, other=0.0)
            h_rows = tl.load(row_ptr[:, None] + (width + d)[None, :], mask=wanted, other=0.0)
            u_terms += u_at_s[:, None] * u_rows
            h_terms += u_at_s[:, None] * h_rows + h_at_s[:, None] * u_rows
        u -= tl.sum(u_terms, 0)
        h -= tl.sum(h_terms, 0)

        here = d == s
        pivot = tl.sum(tl.where(here, u, 0.0), 0)
        square = tl.sum(tl.where(here, h, 0.0), 0)
        chosen_score = tl.div_rn(square, pivot)
        root = tl.sqrt_rn(pivot)
        u = tl.div_rn(u, root)
        h = tl.div_rn(h, root) - u * (0.5 * chosen_score)
        # Rounding errors of the removed column must not make this value, or a score, negative.
        inverse = tl.where(here, 3.4028234663852886e38, inverse - u * u)
        halves = tl.where(here, float("inf"), halves - h * u)
        row_ptr = terms_ptr + step * (2 * width)
        tl.store(row_ptr + d, u, mask=d < width)
        tl.store(row_ptr + width + d, h, mask=d < width)
        tl.store(chosen_ptr + step, s)
        tl.store(scores_ptr + step, chosen_score)
        # The next step reads, in every thread, what other threads have stored.
        tl.debug_barrier()
