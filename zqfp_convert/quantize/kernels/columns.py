"""`columns.settle` in one launch: a thread to a row, columns one after another."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from zqfp_convert.numerics.kernels.books import bounds, magnitude_of
from zqfp_convert.numerics.kernels.casts import on
from zqfp_convert.numerics.scales import Scales
from zqfp_convert.quantize.columns import FEW_ROWS

ROWS = 32  # of one program: one for each thread of a warp
STEPS = 16  # columns that a program holds in registers
EARLIER = 32, 64  # columns before them whose moves it multiplies with at a time, with 1 and 4 warps


def settle(
    block: Tensor,
    moves: Tensor,
    coupling: Tensor,
    marks: Tensor,
    grid: Scales,
    step: Tensor,
) -> None:
    """As `columns.settle`, on a grid of codebooks; the rows of all matrices are contiguous."""
    rows, width = block.shape
    assert block.stride(1) == moves.stride(1) == coupling.stride(1) == marks.stride(1) == 1
    assert step.stride(0) == 1
    above, rises = bounds(grid.books)
    few = rows <= FEW_ROWS  # there is room for warps that share a program's products
    with on(block):
        _settle[(triton.cdiv(rows, ROWS),)](
            block,
            moves,
            coupling,
            step,
            marks,
            rows,
            width,
            block.stride(0),
            moves.stride(0),
            coupling.stride(0),
            marks.stride(0),
            ROWS=ROWS,
            STEPS=STEPS,
            EARLIER=EARLIER[few],
            WHOLE=width % STEPS == 0,
            ABOVE=above,
            RISES=rises,
            PAIR=len(grid.books) > 1,
            num_warps=4 if few else 1,
        )


@triton.jit
def _settle(
    block: tl.tensor,
    moves: tl.tensor,
    coupling: tl.tensor,
    step: tl.tensor,
    marks: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    block_stride: tl.tensor,
    moves_stride: tl.tensor,
    coupling_stride: tl.tensor,
    marks_stride: tl.tensor,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    EARLIER: tl.constexpr,
    WHOLE: tl.constexpr,
    ABOVE: tl.constexpr,
    RISES: tl.constexpr,
    PAIR: tl.constexpr,
) -> None:
    """A program settles some rows: STEPS columns in registers, then the next ones.

    What earlier columns want of them goes over the tensor cores in TF32, as it does between blocks.
    WHOLE says that there are STEPS columns each time.
    """
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = (n < rows)[:, None]
    c = tl.arange(0, STEPS)
    marks += n[:, None] * marks_stride
    block += n[:, None] * block_stride
    moves += n[:, None] * moves_stride
    for start in range(0, width, STEPS):
        mask = inside & (start + c < width)[None, :]
        here = (start + c)[None, :]
        tile = tl.load(block + here, mask, other=0.0)
        wanted = tl.load(moves + here, mask, other=0.0)
        for earlier in range(0, start, EARLIER):
            k = earlier + tl.arange(0, EARLIER)
            moved = tl.load(moves + k[None, :], inside & (k < start)[None, :], other=0.0)
            pulls = tl.load(
                coupling + k[:, None] * coupling_stride + here,
                (k < start)[:, None] & (start + c < width)[None, :],
                other=0.0,
            )
            wanted -= tl.dot(moved, pulls, input_precision="tf32")
        stood = _apart(tile, ROWS, STEPS)
        wants = _apart(wanted, ROWS, STEPS)
        signed = _apart(tl.load(marks + here, mask, other=1.0), ROWS, STEPS)
        settled: tl.tuple = ()
        made: tl.tuple = ()
        for j in tl.static_range(STEPS):
            size = tl.load(step + start + j, WHOLE or start + j < width, other=0.0)
            value = stood[j] + size * wants[j]
            scale = tl.abs(signed[j])
            steps = tl.abs(value) * (1.0 / scale)
            magnitude = magnitude_of(steps, signed[j] < 0, ABOVE, RISES, PAIR) * scale
            rounded = tl.where(value < 0, -magnitude, magnitude)
            move = rounded - stood[j]
            settled += (rounded,)
            made += (move,)
            later: tl.tuple = ()
            for i in tl.static_range(j + 1):
                later += (wants[i],)
            for i in tl.static_range(j + 1, STEPS):
                place = coupling + (start + j) * coupling_stride + start + i
                later += (wants[i] - move * tl.load(place, WHOLE or start + i < width, other=0.0),)
            wants = later
        tl.store(block + here, _beside(settled, 0, ROWS, STEPS), mask)
        tl.store(moves + here, _beside(made, 0, ROWS, STEPS), mask)
        tl.debug_barrier()  # other threads of this program read the moves next


@triton.jit
def _apart(tile: tl.tensor, ROWS: tl.constexpr, WIDTH: tl.constexpr) -> tl.tuple:
    """The columns of a tile `[ROWS, WIDTH]`, each `[ROWS]`: registers of their own."""
    if WIDTH == 1:
        return (tl.reshape(tile, [ROWS]),)
    else:
        halves = tl.permute(tl.reshape(tile, [ROWS, 2, WIDTH // 2]), (0, 2, 1))
        left, right = tl.split(halves)
        return _apart(left, ROWS, WIDTH // 2) + _apart(right, ROWS, WIDTH // 2)


@triton.jit
def _beside(
    columns: tl.tuple, FIRST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
) -> tl.tensor:
    """WIDTH of the columns, from FIRST on, as a tile `[ROWS, WIDTH]`."""
    if WIDTH == 1:
        return tl.reshape(columns[FIRST], [ROWS, 1])
    else:
        left = _beside(columns, FIRST, ROWS, WIDTH // 2)
        right = _beside(columns, FIRST + WIDTH // 2, ROWS, WIDTH // 2)
        return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), [ROWS, WIDTH])
