"""GPTQ: round a weight column by column, each column paying for the errors of those before it.

Frantar et al., "GPTQ" (arXiv:2210.17323), algorithm 1, with static groups: the scales are fixed
before, so that any order of columns leaves the file without a permutation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zqfp_convert.quantize.hessian import Curvature

BLOCK = 128  # columns whose updates are gathered before they reach the rest of the matrix

Grid = Callable[[Tensor, Tensor], Tensor]
"""Rounds values to the nearest representable ones, given their scales (same shape)."""


def gptq(
    weight: Tensor, curvature: Curvature, scale_of: Callable[[Tensor], Tensor], grid: Grid
) -> Tensor:
    """Round `weight` so that `tr(E H E^T)` of the error E stays small.

    Args:
        weight: float32 `[N, K]`.
        curvature: of the inputs, `[K, K]`.
        scale_of: scales `[N, C]` of the columns (int64 `[C]`) asked for.
        grid: the rounding.

    Returns:
        The rounded weight, float32 `[N, K]`, each element on the grid of its scale.
    """
    order, U = curvature.order, curvature.factor
    W = weight[:, order].t().contiguous()  # [K, N]: a column of the weight is a row here
    for start in range(0, len(W), BLOCK):
        end = min(start + BLOCK, len(W))
        block = W[start:end]  # [block, N]
        scales = scale_of(order[start:end]).t().contiguous()
        errors = torch.empty_like(block)
        for j in range(end - start):
            rounded = grid(block[j], scales[j])
            torch.sub(block[j], rounded, out=errors[j])
            block[j] = rounded
            block[j + 1 :].addr_(U[start + j, start + j + 1 : end], errors[j], alpha=-1)
        W[end:].addmm_(U[start:end, end:].t(), errors, alpha=-1)
    result = torch.empty_like(weight)
    result[:, order] = W.t()
    return result
