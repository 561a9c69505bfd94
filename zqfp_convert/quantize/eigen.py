"""Eigenvectors of small matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from zqfp_convert.numerics import kernels

WIDEST = 32  # matrices that the kernel takes


def leading(matrices: Tensor, count: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, as columns, the largest first.

    Args:
        matrices: positive semidefinite, float32 or float64 `[..., w, w]`; of what is not symmetric
            in them the mean counts.
        count: how many, at most w.

    Returns:
        Their dtype, `[..., w, count]`, found in float64. A GPU is not waited for up to a width of
        32; wider ones are the CPU's.
    """
    if kernels.take(matrices) and matrices.shape[-1] <= WIDEST:
        from zqfp_convert.quantize.kernels import eigen

        return eigen.leading(matrices, count)
    here = matrices.cpu().double()
    vectors: Tensor = torch.linalg.eigh((here + here.mT) / 2).eigenvectors
    return vectors.flip(-1)[..., :count].to(matrices)
