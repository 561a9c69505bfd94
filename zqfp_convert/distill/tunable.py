"""A quantized linear whose codes, row scales and low-rank factors can be moved by a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from zqfp_convert.numerics import codebook, fp8, scales
from zqfp_convert.quantize.hessian import relative_error
from zqfp_convert.quantize.lorc import Factors
from zqfp_convert.quantize.weight import QuantizedWeight

REACH = 0.3  # steps of the grid that a weight may be moved from where it starts
EDGE = 0.45  # a start lies at most this far from its code: nearer than the next one
LEVELS = codebook.SIZE


class TunableLinear(nn.Module):
    """`y = (W^ + B diag(s) A) x^ + bias`, with gradients for what a quantized linear consists of.

    A weight has a place on the grid of its codebook, counted in steps (of E2M1 0, 0.5, 1, 1.5, 2,
    3, 4, 6 are 0 to 7), and its code is the nearest whole number. The place starts where the weight
    would be best with all others rounded, but never nearer to another code than to its own, and may
    move by `REACH`. So only roundings that were doubtful can change. Rounding counts as the
    identity in the backward pass (straight-through; Bengio et al., arXiv:1308.3432).
    """

    start: Tensor
    tables: Tensor
    first_code: Tensor | None
    group_scale: Tensor
    row_scale: Tensor | None

    def __init__(self, solved: QuantizedWeight, bias: Tensor | None) -> None:
        """`solved` is where to start, with its doubt; `bias` `[N]` or None."""
        super().__init__()
        assert solved.doubt is not None
        self.solved = replace(solved, doubt=None)
        chosen = solved.scales
        self.group_size, self.columns = chosen.group_size, solved.codes.shape[1]
        by_row = chosen.kind == "m2"
        scale = scales.power_of_two(chosen.exponent) if by_row else chosen.per_group()
        self.register_buffer("group_scale", scale)  # [N, G]
        self.register_buffer("row_scale", chosen.factor if by_row else None)  # [N, 1]
        factors = solved.factors
        columns = torch.arange(self.columns, device=solved.codes.device)
        tables = torch.tensor(chosen.books, device=solved.codes.device)
        self.register_buffer("tables", tables.flatten())  # one codebook after another
        second = None if chosen.choice is None else LEVELS * chosen.choice.to(torch.uint8)
        self.register_buffer("first_code", second)  # [N, G], of each group's codebook in there
        codes = _signed(solved.codes)
        exact = _place(solved.doubt / chosen.per_column(columns), self._magnitudes)
        self.register_buffer("start", codes + (exact - codes).clamp(-EDGE, EDGE))  # [N, K]
        self.shift = nn.Parameter(torch.zeros_like(self.start))
        self.row_gain = nn.Parameter(torch.zeros_like(chosen.factor)) if by_row else None
        self.A = self.B = None
        if factors is not None:
            self.A, self.B = nn.Parameter(factors.A.float()), nn.Parameter(factors.B.float())
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        seen = straight(x, fp8.simulate(x.detach()))
        return linear(seen, self.weight.to(x.dtype), self.bias)

    @property
    def weight(self) -> Tensor:
        """What it stands for now, `[N, K]` float32, compensation included."""
        place = (self.start + self.shift).clamp(1 - LEVELS, LEVELS - 1)
        value = straight(_value(place, self._magnitudes), self._at(place.detach().round()))
        group = torch.arange(self.columns, device=value.device) // self.group_size
        weight = value * self.group_scale[:, group]
        row_scale = self._row_scale()
        weight = weight if row_scale is None else weight * row_scale
        if self.A is None or self.B is None:
            return weight
        return weight + self._factor(self.B) @ (self._factor(self.A) * self._rank_scale())

    @torch.no_grad()
    def confine(self) -> None:
        """Put back what has moved too far."""
        self.shift.clamp_(-REACH, REACH)

    @torch.no_grad()
    def result(self, weight: Tensor) -> QuantizedWeight:
        """The quantized weight that it is now; `weight` `[N, K]` is the original, for the error."""
        place = (self.start + self.shift).clamp(1 - LEVELS, LEVELS - 1).round().int()
        codes = place.abs().to(torch.uint8) | ((place < 0).to(torch.uint8) << 3)
        chosen, factors, row_scale = self.solved.scales, self.solved.factors, self._row_scale()
        if row_scale is not None:
            chosen = replace(chosen, factor=row_scale)
        if self.A is not None and self.B is not None and factors is not None:
            A, B = self._factor(self.A), self._factor(self.B)
            factors = Factors(A.to(factors.A.dtype), B.to(factors.B.dtype), factors.scale)
        chosen = scales.canonical(codes, chosen)
        tuned = QuantizedWeight(codes, chosen, factors, 0.0, None)
        error = relative_error(weight.float() - tuned.dequantize(), weight.float(), None)
        return replace(tuned, weight_error=error)

    def _magnitudes(self, codes: Tensor) -> Tensor:
        """Of codes int64 `[N, K]`, 0 to 7."""
        if self.first_code is not None:
            group = torch.arange(self.columns, device=codes.device) // self.group_size
            codes = codes + self.first_code[:, group]
        return self.tables[codes]

    def _at(self, steps: Tensor) -> Tensor:
        """The values at whole numbers of steps."""
        return self._magnitudes(steps.abs().long()).copysign(steps)

    def _row_scale(self) -> Tensor | None:
        """`[N, 1]`, bfloat16 values, as the format has them."""
        if self.row_scale is None or self.row_gain is None:
            return None
        moved = self.row_scale * (1 + self.row_gain)
        return straight(moved, moved.detach().bfloat16().float())

    def _factor(self, values: Tensor) -> Tensor:
        factors = self.solved.factors
        assert factors is not None
        kept = values.clamp(-fp8.MAX, fp8.MAX) if factors.A.dtype == fp8.DTYPE else values
        return straight(kept, kept.detach().to(factors.A.dtype).float())

    def _rank_scale(self) -> Tensor | float:
        factors = self.solved.factors
        assert factors is not None
        return 1.0 if factors.scale is None else factors.scale[:, None]


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, exactly, with gradients for `value` (straight-through; arXiv:1308.3432)."""
    result: Tensor = _Straight.apply(value, rounded)  # type: ignore[no-untyped-call]
    return result


def _signed(codes: Tensor) -> Tensor:
    """Steps from 0 of codes uint8 `[N, K]`: -7 to 7, float32."""
    steps = (codes & 7).float()
    return torch.where(codes >= 8, -steps, steps)


def _value(place: Tensor, magnitudes: Callable[[Tensor], Tensor]) -> Tensor:
    """The values at any places, linear between the codes; differentiable."""
    size = place.abs()
    below = size.detach().floor().clamp_max(LEVELS - 2).long()
    low, high = magnitudes(below), magnitudes(below + 1)
    return (low + (high - low) * (size - below)) * place.detach().sign()


def _place(values: Tensor, magnitudes: Callable[[Tensor], Tensor]) -> Tensor:
    """The inverse of `_value`; beyond the largest it goes on as from the one before."""
    size = values.abs()
    below = torch.zeros_like(size, dtype=torch.long)
    for code in range(1, LEVELS - 1):
        below += size >= magnitudes(torch.full_like(below, code))
    low, high = magnitudes(below), magnitudes(below + 1)
    return (below + (size - low) / (high - low)).clamp_max(2.0 * LEVELS).copysign(values)


def learnable(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of all tunable linears by kind: roundings, row_scales, factors."""
    kinds: dict[str, list[nn.Parameter]] = {"roundings": [], "row_scales": [], "factors": []}
    for part in module.modules():
        if isinstance(part, TunableLinear):
            kinds["roundings"].append(part.shift)
            if part.row_gain is not None:
                kinds["row_scales"].append(part.row_gain)
            kinds["factors"] += [p for p in (part.A, part.B) if p is not None]
    return kinds


def size_of(values: Tensor) -> float:
    """Root mean square, which a learning rate can be a share of."""
    return math.sqrt(float(values.detach().float().square().mean()))
