"""What a tunable linear stands for, written with autograd's own operations.

Rounding by `value + (rounded - value).detach()`, all of a weight at once, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zqfp_convert.distill.tunable import REACH, TunableLinear
from zqfp_convert.numerics import fp8
from zqfp_convert.numerics.scales import Scales
from zqfp_convert.quantize.weight import QuantizedWeight


def through(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded - value).detach()


def magnitudes(codes: Tensor, chosen: Scales) -> Tensor:
    books = torch.tensor(chosen.books, dtype=torch.float64)
    if chosen.choice is None:
        return books[0][codes]
    group = torch.arange(codes.shape[1]) // chosen.group_size
    return torch.where(chosen.choice[:, group], books[-1][codes], books[0][codes])


def weight_of(module: TunableLinear, solved: QuantizedWeight, learnt: dict[str, Tensor]) -> Tensor:
    """The weight `[N, K]` for float64 `row_gain`, `A` and `B`, as far as it has them.

    `handle` is the shift in units of `REACH`.
    """
    chosen = solved.scales
    place = (module.start.double() + REACH * learnt["handle"]).clamp(-7, 7)
    size = place.abs()
    below = size.detach().floor().clamp_max(6).long()
    low, high = magnitudes(below, chosen), magnitudes(below + 1, chosen)
    value = (low + (high - low) * (size - below)) * place.detach().sign()
    at = magnitudes(place.detach().round().abs().long(), chosen) * place.detach().sign()
    group = torch.arange(place.shape[1]) // chosen.group_size
    weight = through(value, at)
    if "row_gain" in learnt:
        weight = weight * torch.exp2(chosen.exponent.double())[:, group]
        moved = chosen.factor.double() * (1 + learnt["row_gain"])
        weight = weight * through(moved, moved.float().bfloat16().double())
    else:
        weight = weight * chosen.per_group().double()[:, group]
    factors = solved.factors
    if factors is None:
        return weight
    A, B = (encoded(learnt[name], factors.A.dtype) for name in ("A", "B"))
    return weight + B @ (A if factors.scale is None else A * factors.scale.double()[:, None])


def encoded(values: Tensor, dtype: torch.dtype) -> Tensor:
    kept = values.clamp(-448, 448) if dtype == fp8.DTYPE else values
    return through(kept, kept.detach().float().to(dtype).double())
