"""Rounds columns one after another, where each that moves takes those to its right with it.

The solvers are this loop with moves and couplings of their own. A block of columns goes at a time:
what earlier blocks did to it is one matrix product, done before.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from zqfp_convert.numerics import kernels
from zqfp_convert.numerics.scales import Scales

BLOCK = 128  # columns that are settled at a time, at least
FEW_ROWS = 8192  # that leave most of a GPU idle
SPAN = 512  # columns that get what all columns before them did to them at a time


class Grid(Protocol):
    """The representable values of each element of a matrix `[N, K]`; `numerics.Scales` is one."""

    def marks(self, columns: Tensor) -> Tensor:
        """What `round` needs to know of columns, int64 `[C]`: float32 `[N, C]`."""
        ...

    def round(self, values: Tensor, marks: Tensor) -> Tensor:
        """The representable values nearest to `values` under `marks` (shapes that broadcast)."""
        ...


def at_once(matrix: Tensor) -> int:
    """How many columns of a matrix `[N, K]` are best settled at a time.

    The kernel settles few rows, which leave a GPU idle, faster than several calls of it do.
    """
    return SPAN if kernels.take(matrix) and len(matrix) <= FEW_ROWS else BLOCK


def settle(
    block: Tensor,
    moves: Tensor,
    coupling: Tensor,
    marks: Tensor,
    grid: Grid,
    step: Tensor,
) -> None:
    """Round the columns of a block in place, from left to right.

    Column j is rounded at `v_j`, which starts as `block_j + step_j moves_j`, so it moves by
    `m_j = round(v_j) - block_j`. Then `v_i -= step_i coupling_ji m_j` for all i > j.

    Args:
        block: float32 `[N, B]`, a part of a matrix; rounded afterwards.
        moves: float32 `[N, B]`, likewise: what other columns want; the moves m afterwards.
        coupling: float32 `[B, B]`; what lies above its diagonal is used.
        marks: what the grid's `marks` gives for these columns, float32 `[N, B]`.
        grid: of the matrix.
        step: float32 `[B]`.
    """
    if kernels.take(block) and isinstance(grid, Scales):
        from zqfp_convert.quantize.kernels import columns as fused

        fused.settle(block, moves, coupling, marks, grid, step)
        return
    stood = block.t().contiguous()  # [B, N]: a column is a row here
    V = torch.addcmul(stood, moves.t(), step[:, None])
    pulls = coupling * step
    marks = marks.t().contiguous()
    moved = torch.empty_like(V)
    for j in range(len(V)):
        rounded = grid.round(V[j], marks[j])
        torch.sub(rounded, stood[j], out=moved[j])
        V[j] = rounded
        V[j + 1 :].addr_(pulls[j, j + 1 :], moved[j], alpha=-1)
    block.copy_(V.t())
    moves.copy_(moved.t())
