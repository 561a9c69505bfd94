"""Coordinate descent on a fixed grid: what GPTQ's single pass leaves on the table.

Each column moves to its best value given all the others, so the error can only fall.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zqfp_convert.quantize.columns import SPAN, Grid, at_once, settle


def optimum(target: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """Where each element would be best with all others as they are, float32 `[N, K]`.

    `Q + E H / diag(H)`, `E = target - Q`: what `descend` rounds. Columns that saw no input stay.
    """
    return rounded + ((target - rounded) @ hessian) * _step(hessian)


def descend(target: Tensor, rounded: Tensor, hessian: Tensor, grid: Grid, sweeps: int) -> Tensor:
    """Lower `tr(E H E^T)`, `E = target - Q`, from `Q = rounded` on, by `sweeps` passes.

    For one column with the others fixed the minimum of the quadratic is at
    `q_j + (E H)_j / H_jj`, and its best representable value is the nearest one. Columns with
    `H_jj = 0` (or next to it) saw no input and are left alone.

    Args:
        target: float32 `[N, K]`.
        rounded: float32 `[N, K]`, on the grid.
        hessian: float32 `[K, K]`, undamped.
        grid: of the weight.

    Returns:
        Q after the passes, float32 `[N, K]`, on the grid.
    """
    H = hessian
    step = _step(H)
    columns = torch.arange(len(H), device=H.device)
    width = at_once(rounded)
    Q, E = rounded.clone(memory_format=torch.contiguous_format), target - rounded
    for _ in range(sweeps):
        for start in range(0, len(H), SPAN):
            end = min(start + SPAN, len(H))
            moves = E @ H[:, start:end]  # what the errors of all columns want of these, at first
            marks = grid.marks(columns[start:end])
            for left in range(start, end, width):
                right = min(left + width, end)
                here, of_span = slice(left, right), slice(left - start, right - start)
                wanted = moves[:, of_span]
                if left > start:
                    wanted.addmm_(moves[:, : left - start], H[start:left, here], alpha=-1)
                settle(Q[:, here], wanted, H[here, here], marks[:, of_span], grid, step[here])
            E[:, start:end] = target[:, start:end] - Q[:, start:end]
    return Q


def _step(hessian: Tensor) -> Tensor:
    """The inverse of the diagonal; 0 where there was no input, or next to none."""
    step = 1.0 / hessian.diagonal()
    return torch.where((hessian.diagonal() > 0) & step.isfinite(), step, 0.0)
