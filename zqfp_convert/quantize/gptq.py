"""GPTQ: round a weight column by column, each column paying for the errors of those before it.

Frantar et al., "GPTQ" (arXiv:2210.17323), algorithm 1, with static groups: the scales are fixed
before, so that any order of columns leaves the file without a permutation. It is done in the form
of LDLQ, which Chee et al., "QuIP" (arXiv:2307.13304), theorem 6, prove to be the same: that takes
the factor of the Hessian itself, not of its inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zqfp_convert.quantize.columns import SPAN, Grid, at_once, settle
from zqfp_convert.quantize.hessian import Curvature


def gptq(weight: Tensor, curvature: Curvature, grid: Grid) -> Tensor:
    """Round `weight` so that `tr(E H E^T)` of the error E stays small.

    With `R R^T` the damped Hessian, R upper triangular, `tr(E R R^T E^T)` is a sum over columns k
    of `R_kk^2 (e_k + sum_{j<k} e_j R_jk / R_kk)^2`: each is as small as can be when column k is
    rounded where `w_k + sum_{j<k} (w_j - q_j) R_jk / R_kk` is.

    Args:
        weight: float32 `[N, K]`.
        curvature: of the inputs, `[K, K]`.
        grid: of the weight.

    Returns:
        The rounded weight, float32 `[N, K]`, each element on the grid.
    """
    order = curvature.order
    Q = weight.index_select(1, order)
    moves = torch.empty_like(Q)  # Q - W of the columns that are rounded
    width = at_once(Q)
    for start in range(0, len(order), SPAN):
        end = min(start + SPAN, len(order))
        R = curvature.feedback(start, end)
        step = 1 / R[start:].diagonal()
        marks = grid.marks(order[start:end])
        wanted = moves[:, start:end]
        wanted.addmm_(moves[:, :start], R[:start], beta=0, alpha=-1)
        for left in range(start, end, width):
            right = min(left + width, end)
            here, of_span = slice(left, right), slice(left - start, right - start)
            moves[:, here].addmm_(moves[:, start:left], R[start:left, of_span], alpha=-1)
            coupling = R[here, of_span].contiguous()
            settle(Q[:, here], moves[:, here], coupling, marks[:, of_span], grid, step[of_span])
    return Q.index_select(1, torch.argsort(order))
