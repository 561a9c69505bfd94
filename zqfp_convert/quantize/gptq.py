"""GPTQ: round a weight column by column, each column paying for the errors of those before it.

Frantar et al., "GPTQ" (arXiv:2210.17323), algorithm 1, with static groups: the scales are fixed
before, so that any order of columns leaves the file without a permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zqfp_convert.quantize.columns import SPAN, Grid, at_once, settle
from zqfp_convert.quantize.hessian import Curvature


def gptq(weight: Tensor, curvature: Curvature, grid: Grid) -> Tensor:
    """Round `weight` so that `tr(E H E^T)` of the error E stays small.

    Args:
        weight: float32 `[N, K]`.
        curvature: of the inputs, `[K, K]`.
        grid: of the weight.

    Returns:
        The rounded weight, float32 `[N, K]`, each element on the grid.
    """
    order, U = curvature.order, curvature.factor
    W = weight.index_select(1, order)
    errors = torch.empty_like(W)
    step = at_once(W)
    for start in range(0, len(U), SPAN):
        end = min(start + SPAN, len(U))
        _pay(W[:, start:end], errors[:, :start], U[:start, start:end])
        marks = grid.marks(order[start:end])
        for left in range(start, end, step):
            right = min(left + step, end)
            block = W[:, left:right]
            _pay(block, errors[:, start:left], U[start:left, left:right])
            here, of_span = slice(left, right), slice(left - start, right - start)
            settle(block, errors[:, here], U[here, here].contiguous(), marks[:, of_span], grid)
    return W.index_select(1, torch.argsort(order))


def _pay(columns: Tensor, errors: Tensor, shares: Tensor) -> None:
    if len(shares):
        columns.addmm_(errors, shares, alpha=-1)
