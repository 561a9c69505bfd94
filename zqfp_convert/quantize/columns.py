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

BLOCK = 128  # columns that are settled at a time
SPAN = 512  # columns that get what all columns before them did to them at a time


class Grid(Protocol):
    """The representable values of each element of a matrix `[N, K]`; `numerics.Scales` is one."""

    def marks(self, columns: Tensor) -> Tensor:
        """What `round` needs to know of columns, int64 `[C]`: float32 `[N, C]`."""
        ...

    def round(self, values: Tensor, marks: Tensor) -> Tensor:
        """The representable values nearest to `values` under `marks` (shapes that broadcast)."""
        ...


def settle(
    values: Tensor, before: Tensor | None, coupling: Tensor, columns: Tensor, grid: Grid
) -> Tensor:
    """Round the columns of a block in place, from left to right.

    Column j moves by `m_j`, which is `v_j - round(v_j)` without `before` and
    `round(v_j) - before_j` with it; then `v_i -= coupling_ji m_j` for all i > j.

    Args:
        values: float32 `[N, B]`; rounded afterwards.
        before: float32 `[N, B]`, or None.
        coupling: float32 `[B, B]`; what lies above its diagonal is used.
        columns: int64 `[B]`, where in the matrix the columns are.
        grid: of the matrix.

    Returns:
        The moves m, float32 `[N, B]`.
    """
    if kernels.take(values) and isinstance(grid, Scales):
        from zqfp_convert.quantize.kernels import columns as fused

        return fused.settle(values, before, coupling, columns, grid)
    V = values.t().contiguous()  # [B, N]: a column is a row here
    stood = None if before is None else before.t()
    marks = grid.marks(columns).t().contiguous()
    moves = torch.empty_like(V)
    for j in range(len(V)):
        rounded = grid.round(V[j], marks[j])
        if stood is None:
            torch.sub(V[j], rounded, out=moves[j])
        else:
            torch.sub(rounded, stood[j], out=moves[j])
        V[j] = rounded
        V[j + 1 :].addr_(coupling[j, j + 1 :], moves[j], alpha=-1)
    values.copy_(V.t())
    return moves.t()
