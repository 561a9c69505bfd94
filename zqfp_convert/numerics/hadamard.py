"""Rotation by a regular Hadamard matrix: orthogonal, symmetric, its own inverse, exact in binary.

The matrix of order 4 is `J / 2 - I` (J all ones), its Kronecker powers those of order 16, 64, 256
and so on. All rows of such a matrix have the same sum, so a vector of equal numbers stays as it is
(K. J. Horadam, "Hadamard Matrices and Their Applications", 2007, section 2.1). That is why these
rotations pass through a LayerNorm, which subtracts the mean, as well as through an RMSNorm.
"""

from __future__ import annotations

import torch
from torch import Tensor

ORDER = 4


def block_of(width: int) -> int:
    """The order of the blocks on the diagonal for a width: its largest divisor `4^k`."""
    block = 1
    while width % (block * ORDER) == 0:
        block *= ORDER
    return block


def rotate(values: Tensor, dim: int = -1) -> Tensor:
    """Multiply along a dimension with the block-diagonal rotation of its width, in float32 or more.

    `log4(block)` passes of `y = sum / 2 - x` over four numbers each.
    """
    width, block = values.shape[dim], block_of(values.shape[dim])
    wide = values if values.dtype == torch.float64 else values.float()
    moved = wide.movedim(dim, -1)
    result, apart = moved.reshape(-1, width), 1
    while apart < block:
        fours = result.view(len(result), -1, ORDER, apart)
        result = (fours.sum(2, keepdim=True) / 2 - fours).reshape(-1, width)
        apart *= ORDER
    return result.view(moved.shape).movedim(-1, dim)
