"""Division of rows by a matrix of which the Cholesky factor is known, without its inverse.

Most of the work is products, which may go over tensor cores; see `tensor_cores`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zqfp_convert.quantize.tensor_cores import float32_product, kept

BLOCK = 512  # columns that are solved for at a time
LEAF = 64  # columns of blocks that are inverted as they are, not by halves


def divide(rows: Tensor, lower: Tensor) -> None:
    """`rows (L L^T)^-1` in place, by substitution forward and backward.

    What is found of a block of columns is rounded to what the tensor cores keep of it before later
    blocks are found: these make up for that, as they do for any error of it that they see. Products
    with L would round it anyway, and nothing would make up for it then.

    Args:
        rows: float32 `[N, K]`.
        lower: L, float32 `[K, K]`, lower triangular.
    """
    inverses = _inverses(lower)
    blocks = [slice(at, min(at + BLOCK, len(lower))) for at in range(0, len(lower), BLOCK)]
    for here, inverse in zip(blocks, inverses, strict=True):
        block = rows[:, here]
        block.addmm_(rows[:, : here.start], lower[here, : here.start].t(), alpha=-1)
        block.copy_(kept(float32_product(block, inverse.t())))
    for here, inverse in zip(reversed(blocks), reversed(inverses), strict=True):
        block = rows[:, here]
        block.addmm_(rows[:, here.stop :], lower[here.stop :, here], alpha=-1)
        block.copy_(kept(float32_product(block, inverse)))


def _inverses(lower: Tensor) -> list[Tensor]:
    """Inverses of the blocks on its diagonal, float32.

    They are made in float64, which tensor cores do not round and which costs little here.
    """
    size = len(lower)
    width = min(BLOCK, size)
    unit = torch.eye(width, dtype=torch.float64, device=lower.device)
    blocks = unit.repeat(-(-size // width), 1, 1)  # what fills up the last one stays as it is
    for block, start in zip(blocks, range(0, size, width), strict=True):
        corner = lower[start : start + width, start : start + width]
        block[: len(corner), : len(corner)] = corner
    inverses = list(_inverse(blocks).float())
    last = size - width * (len(inverses) - 1)
    inverses[-1] = inverses[-1][:last, :last]
    return inverses


def _inverse(lower: Tensor) -> Tensor:
    """Of lower triangular matrices `[..., S, S]`, half by half."""
    size = lower.shape[-1]
    if size <= LEAF or size % 2:
        unit = torch.eye(size, dtype=lower.dtype, device=lower.device)
        inverse: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
        return inverse
    first, second = slice(size // 2), slice(size // 2, size)
    corners = _inverse(torch.stack([lower[..., first, first], lower[..., second, second]]))
    inverse = torch.zeros_like(lower)
    inverse[..., first, first], inverse[..., second, second] = corners
    inverse[..., second, first] = -(corners[1] @ lower[..., second, first] @ corners[0])
    return inverse
