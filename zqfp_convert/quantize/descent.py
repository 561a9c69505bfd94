"""Coordinate descent on a fixed grid: what GPTQ's single pass leaves on the table.

Each column moves to its best value given all the others, so the error can only fall.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zqfp_convert.quantize.gptq import BLOCK, Grid


def optimum(target: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """Where each element would be best with all others as they are, float32 `[N, K]`.

    `Q + E H / diag(H)`, `E = target - Q`: what `descend` rounds. Columns that saw no input stay.
    """
    step = 1.0 / hessian.diagonal()
    step = torch.where((hessian.diagonal() > 0) & step.isfinite(), step, 0.0)
    return rounded + ((target - rounded) @ hessian) * step


def descend(
    target: Tensor,
    rounded: Tensor,
    hessian: Tensor,
    scale_of: Callable[[Tensor], Tensor],
    grid: Grid,
    sweeps: int,
) -> Tensor:
    """Lower `tr(E H E^T)`, `E = target - Q`, from `Q = rounded` on, by `sweeps` passes.

    For one column with the others fixed the minimum of the quadratic is at
    `q_j + (E H)_j / H_jj`, and its best representable value is the nearest one. Columns with
    `H_jj = 0` (or next to it) saw no input and are left alone.

    Args:
        target: float32 `[N, K]`.
        rounded: float32 `[N, K]`, on the grid.
        hessian: float32 `[K, K]`, undamped.
        scale_of, grid: as in `gptq`.

    Returns:
        Q after the passes, float32 `[N, K]`, on the grid.
    """
    H = hessian
    step = 1.0 / H.diagonal()
    step = torch.where((H.diagonal() > 0) & step.isfinite(), step, 0.0)
    columns = torch.arange(len(H), device=H.device)
    goal, Q = target.t(), rounded.t().contiguous()  # [K, N]
    for _ in range(sweeps):
        gradient = H @ (goal - Q)  # rows of (E H)^T, kept current below
        for start in range(0, len(H), BLOCK):
            end = min(start + BLOCK, len(H))
            within = H[start:end, start:end]
            scales = scale_of(columns[start:end]).t().contiguous()
            pull = gradient[start:end].clone()  # [block, N]
            moves = torch.empty_like(pull)
            for j in range(end - start):
                moved = grid(torch.addcmul(Q[start + j], pull[j], step[start + j]), scales[j])
                torch.sub(moved, Q[start + j], out=moves[j])
                Q[start + j] = moved
                pull.addr_(within[:, j], moves[j], alpha=-1)
            gradient.addmm_(H[:, start:end], moves, alpha=-1)
    return Q.t().contiguous()
