"""`columns.settle` in one launch: rows go their way in parallel, columns one after another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zqfp_convert.numerics.kernels.books import bounds, magnitude_of
from zqfp_convert.numerics.kernels.casts import on
from zqfp_convert.numerics.scales import Scales

ROWS = 16  # of one program
STEPS = 32  # columns that a program holds at a time


def settle(
    values: Tensor, before: Tensor | None, coupling: Tensor, columns: Tensor, grid: Scales
) -> Tensor:
    """As `columns.settle`, on a grid of codebooks."""
    rows, width = values.shape
    marks = grid.marks_of_groups()
    groups = (columns // grid.group_size).int()
    moves = torch.empty(rows, width, device=values.device)
    coupling = coupling if coupling.stride(1) == 1 else coupling.contiguous()
    above, rises = bounds(grid.books)
    with on(values):
        _settle[(triton.cdiv(rows, ROWS),)](
            values,
            values if before is None else before,
            coupling,
            marks,
            groups,
            moves,
            rows,
            width,
            marks.shape[1],
            values.stride(0),
            values.stride(0) if before is None else before.stride(0),
            coupling.stride(0),
            ROWS=ROWS,
            STEPS=STEPS,
            DESCENT=before is not None,
            ABOVE=above,
            RISES=rises,
            PAIR=len(grid.books) > 1,
            num_warps=1,
        )
    return moves


@triton.jit
def _settle(
    values: tl.tensor,
    before: tl.tensor,
    coupling: tl.tensor,
    marks: tl.tensor,
    groups: tl.tensor,
    moves: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    group_count: tl.tensor,
    values_stride: tl.tensor,
    before_stride: tl.tensor,
    coupling_stride: tl.tensor,
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
    marks += n * group_count
    for start in range(0, width, STEPS):
        mask = inside[:, None] & (start + c < width)[None, :]
        tile = tl.load(values + n[:, None] * values_stride + (start + c)[None, :], mask, other=0.0)
        for earlier in range(0, start, STEPS):
            moved = tl.load(moves + n[:, None] * width + (earlier + c)[None, :], inside[:, None])
            pulls = tl.load(
                coupling + (earlier + c)[:, None] * coupling_stride + (start + c)[None, :],
                (start + c < width)[None, :],
                other=0.0,
            )
            tile -= tl.dot(moved, pulls, input_precision="ieee")
        if DESCENT:
            place = before + n[:, None] * before_stride + (start + c)[None, :]
            stood = tl.load(place, mask, other=0.0)
        else:
            stood = tile
        steps = tl.zeros((ROWS, STEPS), tl.float32)
        for j in range(min(STEPS, width - start)):
            here = (c == j)[None, :]
            value = tl.sum(tl.where(here, tile, 0.0), 1)
            mark = tl.load(marks + tl.load(groups + start + j), inside, other=1.0)
            scale = tl.abs(mark)
            magnitude = (
                magnitude_of(tl.div_rn(tl.abs(value), scale), mark < 0, ABOVE, RISES, PAIR) * scale
            )
            rounded = tl.where(value < 0, -magnitude, magnitude)
            if DESCENT:  # noqa: SIM108 (a constant: one of the two is compiled)
                step = rounded - tl.sum(tl.where(here, stood, 0.0), 1)
            else:
                step = value - rounded
            later = (c > j) & (start + c < width)
            pull = tl.load(coupling + (start + j) * coupling_stride + start + c, later, other=0.0)
            tile = tl.where(here, rounded[:, None], tile - step[:, None] * pull[None, :])
            steps = tl.where(here, step[:, None], steps)
        tl.store(values + n[:, None] * values_stride + (start + c)[None, :], tile, mask)
        tl.store(moves + n[:, None] * width + (start + c)[None, :], steps, mask)
        tl.debug_barrier()  # other threads of this program read the moves next
