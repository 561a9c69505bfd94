"""Low-rank factors of a fused linear: those of its parts become one pair.

Knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stack(
    A: Tensor, B: Tensor, scale: Tensor | None, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One pair of factors that gives each part of a fused linear the product of its own.

    Factors A lie one below the other, those of B on a diagonal of blocks. Parts with the same A
    (a linear that is fused on disk already) share it.

    Args:
        A: `[P, r, K]`, of each part.
        B: `[N, r]`, rows of the parts one after another.
        scale: float32 `[P, r]`, or None.
        sizes: rows of each part; their sum is N.

    Returns:
        A `[R, K]`, B `[N, R]`, scale `[R]` or None; R is r times the number of different A.
    """
    rank = A.shape[1]
    own: list[int] = []  # parts whose A none before has
    of_part: list[int] = []  # its place among these
    for part in range(len(sizes)):
        same = [at for at, other in enumerate(own) if _same(A, scale, part, other)]
        if not same:
            own.append(part)
        of_part.append(same[0] if same else len(own) - 1)
    wide = torch.zeros(B.shape[0], rank * len(own), dtype=B.dtype, device=B.device)
    first = 0
    for at, size in zip(of_part, sizes, strict=True):
        rows = slice(first, first + size)
        wide[rows, at * rank : (at + 1) * rank] = B[rows]
        first += size
    stacked = A.view(torch.uint8)[own].view(A.dtype)  # indexing is not for FP8 everywhere
    return stacked.flatten(0, 1), wide, None if scale is None else scale[own].flatten()


def _same(A: Tensor, scale: Tensor | None, one: int, other: int) -> bool:
    if scale is not None and not torch.equal(scale[one], scale[other]):
        return False
    return torch.equal(A[one].view(torch.uint8), A[other].view(torch.uint8))
