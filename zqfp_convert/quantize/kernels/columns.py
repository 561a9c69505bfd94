"""`columns.settle` in one launch: rows go their way in parallel, columns one after another."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from zqfp_convert.numerics.kernels.books import bounds, magnitude_of
from zqfp_convert.numerics.kernels.casts import on
from zqfp_convert.numerics.scales import Scales

ROWS = 16  # of one program
STEPS = 16  # columns that a program holds at a time


def settle(
    block: Tensor,
    moves: Tensor,
    coupling: Tensor,
    columns: Tensor,
    grid: Scales,
    step: Tensor | None = None,
) -> None:
    """As `columns.settle`, on a grid of codebooks; the rows of all matrices are contiguous."""
    rows, width = block.shape
    assert block.stride(1) == moves.stride(1) == coupling.stride(1) == 1
    above, rises = bounds(grid.books)
    with on(block):
        _settle[(triton.cdiv(rows, ROWS),)](
            block,
            moves,
            coupling,
            block if step is None else step,
            grid.marked,
            columns,
            rows,
            width,
            grid.marked.shape[1],
            block.stride(0),
            moves.stride(0),
            coupling.stride(0),
            GROUP=grid.group_size,
            ROWS=ROWS,
            STEPS=STEPS,
            DESCENT=step is not None,
            ABOVE=above,
            RISES=rises,
            PAIR=len(grid.books) > 1,
            num_warps=1,
        )


@triton.jit
def _settle(
    block: tl.tensor,
    moves: tl.tensor,
    coupling: tl.tensor,
    step: tl.tensor,
    marks: tl.tensor,
    columns: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    groups: tl.tensor,
    block_stride: tl.tensor,
    moves_stride: tl.tensor,
    coupling_stride: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    DESCENT: tl.constexpr,
    ABOVE: tl.constexpr,
    RISES: tl.constexpr,
    PAIR: tl.constexpr,
) -> None:
    """A program settles some rows: STEPS columns in registers, then the next ones."""
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = n < rows
    c = tl.arange(0, STEPS)
    marks += n[:, None] * groups
    block += n[:, None] * block_stride
    moves += n[:, None] * moves_stride
    for start in range(0, width, STEPS):
        mask = inside[:, None] & (start + c < width)[None, :]
        stood = tl.load(block + (start + c)[None, :], mask, other=0.0)
        tile = stood
        if DESCENT:
            size = tl.load(step + start + c, start + c < width, other=0.0)[None, :]
            tile += tl.load(moves + (start + c)[None, :], mask, other=0.0) * size
        for earlier in range(0, start, STEPS):
            moved = tl.load(moves + (earlier + c)[None, :], inside[:, None], other=0.0)
            earlier_pulls = tl.load(
                coupling + (earlier + c)[:, None] * coupling_stride + (start + c)[None, :],
                (start + c < width)[None, :],
                other=0.0,
            )
            if DESCENT:
                earlier_pulls *= size
            tile -= tl.dot(moved, earlier_pulls, input_precision="tf32x3")
        made = tl.zeros((ROWS, STEPS), tl.float32)
        # All that the steps need is in registers: a load would have them wait.
        group = tl.load(columns + start + c, start + c < width, other=0) // GROUP
        signed = tl.load(marks + group[None, :], mask, other=1.0)
        here = (start + c)[:, None]
        pulls = tl.load(
            coupling + here * coupling_stride + (start + c)[None, :],
            (here < width) & (start + c < width)[None, :] & (c[:, None] < c[None, :]),
            other=0.0,
        )
        if DESCENT:
            pulls *= size
        for j in range(min(STEPS, width - start)):
            here = (c == j)[None, :]
            value = tl.sum(tl.where(here, tile, 0.0), 1)
            mark = tl.sum(tl.where(here, signed, 0.0), 1)
            pull = tl.sum(tl.where((c == j)[:, None], pulls, 0.0), 0)
            scale = tl.abs(mark)
            magnitude = magnitude_of(tl.abs(value) / scale, mark < 0, ABOVE, RISES, PAIR) * scale
            rounded = tl.where(value < 0, -magnitude, magnitude)
            if DESCENT:  # noqa: SIM108 (a constant: one of the two is compiled)
                move = rounded - tl.sum(tl.where(here, stood, 0.0), 1)
            else:
                move = value - rounded
            tile = tl.where(here, rounded[:, None], tile - move[:, None] * pull[None, :])
            made = tl.where(here, move[:, None], made)
        tl.store(block + (start + c)[None, :], tile, mask)
        tl.store(moves + (start + c)[None, :], made, mask)
        tl.debug_barrier()  # other threads of this program read the moves next
