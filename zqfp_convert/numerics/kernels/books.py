"""Rounding to one or two codebooks inside a kernel."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
import triton
import triton.language as tl

from zqfp_convert.numerics import e2m1
from zqfp_convert.numerics.codebook import Codebook


@cache
def bounds(books: tuple[Codebook, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The magnitudes above which each codebook goes up by a code, and by how much it goes.

    All of the first codebook, then all of the second, for which the first stands in where there is
    one. A tie goes to the smaller magnitude, with E2M1 to the even code, as `codebook.round_to` has
    it: where that is the larger one, the bound is the next smaller float32.
    """
    above, rises = [], []
    for book in (books[0], books[-1]):
        for code, (low, high) in enumerate(pairwise(book)):
            middle = torch.tensor((low + high) / 2, dtype=torch.float32)
            if book == e2m1.MAGNITUDES and code % 2 == 1:
                middle = torch.nextafter(middle, torch.zeros(()))
            above.append(float(middle))
            rises.append(high - low)
    return tuple(above), tuple(rises)


@triton.jit
def magnitude_of(
    steps: tl.tensor,
    second: tl.tensor,
    ABOVE: tl.constexpr,
    RISES: tl.constexpr,
    PAIR: tl.constexpr,
) -> tl.tensor:
    """The nearest magnitudes of the first codebook, or of the second one where it holds."""
    rises: tl.tuple = ()
    for code in tl.static_range(7):
        if PAIR:
            above = tl.where(second, ABOVE[7 + code], ABOVE[code])
            rise = tl.where(second, RISES[7 + code], RISES[code])
        else:
            above, rise = ABOVE[code], RISES[code]
        rises += (tl.where(steps > above, rise, 0.0),)
    # Exact in any order; in this one, additions wait for one another least.
    low = (rises[0] + rises[1]) + (rises[2] + rises[3])
    return low + ((rises[4] + rises[5]) + rises[6])
