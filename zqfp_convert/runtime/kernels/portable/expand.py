"""Arranged weights to their exact FP8 matrix, for products that do not unpack it themselves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zqfp_convert.numerics import codebook, fp8
from zqfp_convert.numerics.codebook import Codebook
from zqfp_convert.numerics.kernels.casts import on
from zqfp_convert.runtime import expanded
from zqfp_convert.runtime.kernels.portable import layout, unpack

ROWS = 64  # of a program's tile, beside one block of columns


def expand(
    weights: Tensor,
    shifts: Tensor,
    group_size: int,
    out: Tensor,
    books: tuple[Codebook, ...] = (codebook.E2M1,),
) -> None:
    """Write the FP8 matrix of a layer into `out`, the bytes of `runtime.expanded.expand`.

    Args:
        weights: uint8 `[N, K' / 2]`, and
        shifts: uint8 `[N, G']`, from `layout.arrange`.
        group_size: as it was given to `arrange`.
        out: uint8 `[N', K'']`, contiguous, `N' >= N`, `K'' >= K`, `K''` a multiple of 16; what
            lies beyond N and K is set to 0.
        books: what the codes stand for.
    """
    first, second = unpack.table(books)
    rows, width = weights.shape[0], 2 * weights.shape[1]
    grid = (triton.cdiv(out.shape[0], ROWS), triton.cdiv(out.shape[1], layout.BLOCK))
    with on(weights):
        _expand[grid](
            weights,
            shifts,
            out,
            rows,
            width // layout.BLOCK,
            shifts.shape[1],
            out.shape[0],
            out.shape[1] // 16,
            GROUP=width if shifts.shape[1] == 1 else group_size,
            ROWS=ROWS,
            FAST=unpack.fast(books),
            FIRST=first,
            SECOND=second,
            num_warps=4,
        )


def expand_twin(
    weights: Tensor,
    shifts: Tensor,
    group_size: int,
    out: Tensor,
    books: tuple[Codebook, ...] = (codebook.E2M1,),
) -> None:
    """`expand` in plain torch."""
    rows, width = weights.shape[0], min(2 * weights.shape[1], out.shape[1])
    matrix = layout.matrix_of(weights, shifts, group_size, books, expanded.TOP_SHIFT)
    out.zero_()
    out[:rows, :width] = fp8.encode(matrix[:, :width]).view(torch.uint8)


@triton.jit
def _expand(
    weights: tl.tensor,
    shifts: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    blocks: tl.tensor,
    groups: tl.tensor,
    out_rows: tl.tensor,
    out_runs: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    FAST: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
) -> None:
    """A program expands one block of columns of a tile of rows."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    ks = tl.arange(0, 64)
    inside = (n < rows) & (block < blocks)
    n_read = tl.minimum(n, rows - 1).to(tl.int64)
    block_read = tl.minimum(block, blocks - 1)
    place = n_read[:, None] * (blocks * 64) + block_read * 64 + ks[None, :]
    packed = tl.load(weights + place, mask=inside[:, None], other=0)
    low_shift, high_shift = unpack.block_shifts(shifts + n_read * groups, block_read, GROUP)
    low, high = unpack.unpack(packed, low_shift, high_shift, FAST, FIRST, SECOND)
    # Rows of whole runs of 16 bytes: the compiler sees that stores of 16 bytes are aligned.
    out_columns = out_runs * 16
    column = block * 128 + ks
    first = out + n[:, None].to(tl.int64) * out_columns + column[None, :]
    kept = (n < out_rows)[:, None]
    tl.store(first, low, mask=kept & (column < out_columns)[None, :])
    tl.store(first + 64, high, mask=kept & (column + 64 < out_columns)[None, :])
