"""Division of rows by a matrix of which the Cholesky factor is known, without its inverse.

Most of the work is products, which may go over tensor cores; see `tensor_cores`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from zqfp_convert.quantize.tensor_cores import Parts, kept, product_of_parts, split

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
    size = len(lower)
    blocks = [slice(at, min(at + BLOCK, size)) for at in range(0, size, BLOCK)]
    inverses = _inverses(lower, blocks)
    for here, inverse in zip(blocks, inverses, strict=True):
        block = rows[:, here]
        block.addmm_(rows[:, : here.start], lower[here, : here.start].t(), alpha=-1)
        block.copy_(kept(product_of_parts(split(block), inverse.like(torch.t))))
    for here, inverse in zip(reversed(blocks), reversed(inverses), strict=True):
        block = rows[:, here]
        block.addmm_(rows[:, here.stop :], lower[here.stop :, here], alpha=-1)
        block.copy_(kept(product_of_parts(split(block), inverse)))


def _inverses(lower: Tensor, blocks: list[slice]) -> list[Parts]:
    """Inverses of the blocks on its diagonal, float32.

    They are made in float64, which tensor cores do not round and which costs little here.
    """
    width = blocks[0].stop
    unit = torch.eye(width, dtype=torch.float64, device=lower.device)
    corners = unit.repeat(len(blocks), 1, 1)  # what fills up the last one stays as it is
    for index, here in enumerate(blocks):
        _corner(blocks, index, corners).copy_(lower[here, here])
    every = split(_inverse(corners).float())  # of all at once, as it takes many small steps
    return [every.like(partial(_corner, blocks, index)) for index in range(len(blocks))]


def _corner(blocks: list[slice], index: int, stack: Tensor) -> Tensor:
    size = blocks[index].stop - blocks[index].start
    return stack[index, :size, :size]


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
