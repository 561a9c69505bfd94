"""The costs of all scales that a search tries, for many groups at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zqfp_convert.numerics.codebook import Codebook
from zqfp_convert.numerics.kernels.books import bounds, magnitude_of
from zqfp_convert.numerics.kernels.casts import on

ELEMENTS = 2048  # of weights that one program holds


def costs(
    groups: Tensor, importance: Tensor, mantissas: Tensor, books: tuple[Codebook, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """For each mantissa and group the best of two exponents and of the codebooks.

    Args:
        groups: weights, float32 `[N, G, group_size]`, contiguous.
        importance: float32 `[1, G, group_size]`.
        mantissas: float32 `[M]`.
        books: one codebook, or two.

    Returns:
        Weighted squared error, float32 `[M, N, G]`; exponent, int32 of that shape; whether the
        second codebook has it, bool of that shape.
    """
    rows, count, size = groups.shape
    shape = (len(mantissas), rows, count)
    cost = torch.empty(shape, device=groups.device)
    exponent = torch.empty(shape, dtype=torch.int32, device=groups.device)
    second = torch.empty(shape, dtype=torch.bool, device=groups.device)
    width = triton.next_power_of_2(size)
    at_once = max(ELEMENTS // width, 1)
    above, rises = bounds(books)
    with on(groups):
        _costs[(triton.cdiv(rows * count, at_once),)](
            groups,
            importance.contiguous(),  # it may be the diagonal of a matrix
            mantissas,
            cost,
            exponent,
            second.view(torch.uint8),
            rows * count,
            count,
            size,
            len(mantissas),
            books[0][-1] * 4 / 3,
            books[-1][-1] * 4 / 3,
            GROUPS=at_once,
            WIDTH=width,
            ABOVE=above,
            RISES=rises,
            PAIR=len(books) > 1,
            num_warps=4,
        )
    return cost, exponent, second


@triton.jit(do_not_specialize=["total", "count", "tried"])  # by what they are divisible by
def _costs(
    groups: tl.tensor,
    importance: tl.tensor,
    mantissas: tl.tensor,
    costs: tl.tensor,
    exponents: tl.tensor,
    seconds: tl.tensor,
    total: tl.tensor,
    count: tl.tensor,
    size: tl.tensor,
    tried: tl.tensor,
    clipped: tl.tensor,
    clipped_too: tl.tensor,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ABOVE: tl.constexpr,
    RISES: tl.constexpr,
    PAIR: tl.constexpr,
) -> None:
    """A program tries all scales of some groups."""
    group = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)).to(tl.int64)
    k = tl.arange(0, WIDTH)
    mask = (group < total)[:, None] & (k < size)[None, :]
    weights = tl.load(groups + group[:, None] * size + k[None, :], mask=mask, other=0.0)
    place = (group % count)[:, None] * size + k[None, :]
    matters = tl.load(importance + place, mask=mask, other=0.0)
    absmax = tl.max(tl.abs(weights), 1)
    for i in range(tried):
        mantissa = tl.load(mantissas + i)
        cost, exponent = _better(
            weights, matters, absmax, mantissa, clipped, False, ABOVE, RISES, PAIR
        )
        second = tl.zeros_like(cost).to(tl.int1)
        if PAIR:
            other, exponent_too = _better(
                weights, matters, absmax, mantissa, clipped_too, True, ABOVE, RISES, PAIR
            )
            second = other < cost
            cost = tl.where(second, other, cost)
            exponent = tl.where(second, exponent_too, exponent)
        at = i * total + group
        tl.store(costs + at, cost, mask=group < total)
        tl.store(exponents + at, exponent, mask=group < total)
        tl.store(seconds + at, second.to(tl.uint8), mask=group < total)


@triton.jit
def _better(
    weights: tl.tensor,
    matters: tl.tensor,
    absmax: tl.tensor,
    mantissa: tl.tensor,
    clipped: tl.tensor,
    SECOND: tl.constexpr,
    ABOVE: tl.constexpr,
    RISES: tl.constexpr,
    PAIR: tl.constexpr,
) -> tl.tensor:
    """The lower cost of two exponents, and the exponent."""
    ratio = tl.div_rn(tl.div_rn(absmax, mantissa), clipped)
    bits = ratio.to(tl.int32, bitcast=True)
    low = tl.where(bits == 0, 0, (bits >> 23) - 126)  # floor(log2) + 1
    least = _cost(weights, matters, mantissa, low, SECOND, ABOVE, RISES, PAIR)
    more = _cost(weights, matters, mantissa, low + 1, SECOND, ABOVE, RISES, PAIR)
    return tl.minimum(least, more), tl.where(least <= more, low, low + 1)


@triton.jit
def _cost(
    weights: tl.tensor,
    matters: tl.tensor,
    mantissa: tl.tensor,
    exponent: tl.tensor,
    SECOND: tl.constexpr,
    ABOVE: tl.constexpr,
    RISES: tl.constexpr,
    PAIR: tl.constexpr,
) -> tl.tensor:
    scale = (mantissa * ((exponent + 127) << 23).to(tl.float32, bitcast=True))[:, None]
    magnitude = tl.abs(weights)
    second = tl.full(weights.shape, SECOND, tl.int1)
    error = (
        magnitude - magnitude_of(tl.div_rn(magnitude, scale), second, ABOVE, RISES, PAIR) * scale
    )
    return tl.sum(error * error * matters, 1)
