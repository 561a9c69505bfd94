"""A quantized linear whose codes, row scales and low-rank factors can be moved by a gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from zqfp_convert.distill.adam import ONE
from zqfp_convert.distill.grid import TOP, Grid
from zqfp_convert.numerics import fp8, scales
from zqfp_convert.quantize.hessian import relative_error
from zqfp_convert.quantize.lorc import Factors
from zqfp_convert.quantize.weight import QuantizedWeight

REACH = 0.3  # steps of the grid that a weight may be moved from where it starts
EDGE = 0.45  # a start lies at most this far from its code: nearer than the next one


class TunableLinear(nn.Module):
    """`y = (W^ + B diag(s) A) x^ + bias`, with gradients for what a quantized linear consists of.

    A weight has a place on the grid of its codebook (see `Grid`), and its code is the nearest whole
    number. The place starts where the weight would be best with all others rounded, but never
    nearer to another code than to its own, and may move by `REACH`. So only roundings that were
    doubtful can change. Rounding counts as the identity in the backward pass (straight-through;
    Bengio et al., arXiv:1308.3432).

    A weight takes 4 bytes, or 1 if roundings are left as they are; the matrix that it stands for is
    made anew for each use.

    Attributes:
        start: float16 `[N, K]`, the places; int8 if no code can change.
        shift: int16 `[N, K]`, how far they have moved, `ONE` for `REACH`; None if they cannot.
        handle: takes the gradient of `shift`, in bfloat16, and holds nothing.
        row_gain: float32 `[N, 1]`: row scales are `1 + row_gain` times what they were; M2 only.
        A, B: float32, the low-rank factors, or None.
        bias: `[N]` or None; it is not tuned.
    """

    def __init__(
        self,
        solved: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        roundings: bool = True,
        start: Tensor | None = None,
    ) -> None:
        """`solved` is where to start, with its doubt where `roundings` are to be tuned.

        Instead of the doubt it can be `start`, what another one made of it.
        """
        super().__init__()
        chosen, factors = solved.scales, solved.factors
        self._scales, self._factors = chosen, factors
        self.grid = Grid.of(chosen, solved.codes.shape[1])
        self.start = signed(solved.codes).contiguous()
        self.shift: Tensor | None = None
        self.handle: nn.Parameter | None = None
        if roundings:
            if start is None:
                assert solved.doubt is not None
                start = _starts(self.start, solved.doubt, chosen.per_group(), self.grid)
            self.start = start
            self.shift = torch.zeros_like(self.start, dtype=torch.int16)
            nothing = torch.zeros((), dtype=torch.bfloat16, device=self.start.device)
            self.handle = nn.Parameter(nothing.expand(self.start.shape))
        gain = torch.zeros_like(chosen.factor) if chosen.kind == "m2" else None
        self.row_gain = None if gain is None else nn.Parameter(gain)
        self.A = self.B = None
        if factors is not None:
            self.A = nn.Parameter(factors.A.float().contiguous())
            self.B = nn.Parameter(factors.B.float().contiguous())
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        seen = straight(x, fp8.simulate(x.detach()))
        return linear(seen, self.weight(x.dtype), self.bias)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What it stands for now, `[N, K]`, compensation included; worked out in float32."""
        A, B = self._encoded()
        if A is not None and self._factors is not None and self._factors.scale is not None:
            A = A * self._factors.scale[:, None]
        made: Tensor = _Weight.apply(  # type: ignore[no-untyped-call]
            self, dtype, self.handle, self._row_scale(), A, B
        )
        return made

    def place(self, rows: slice) -> Tensor:
        """Where the weights of some rows are now, float32 `[rows, K]`."""
        place = self.start[rows].float()
        return place if self.shift is None else place.add_(self.shift[rows], alpha=REACH / ONE)

    @torch.no_grad()
    def reset(self) -> None:
        """Put everything back to where it started."""
        for moved in (self.shift, self.row_gain):
            if moved is not None:
                moved.zero_()
        if self.A is not None and self.B is not None and self._factors is not None:
            self.A.copy_(self._factors.A)
            self.B.copy_(self._factors.B)

    @torch.no_grad()
    def result(self, weight: Tensor) -> QuantizedWeight:
        """The quantized weight that it is now; `weight` `[N, K]` is the original, for the error."""
        codes = torch.empty_like(self.start, dtype=torch.uint8)
        for rows in self.grid.slices():
            place = self.place(rows).round_().clamp_(-TOP, TOP)
            codes[rows] = place.abs().to(torch.uint8) | ((place < 0).to(torch.uint8) << 3)
        chosen, factors, row_scale = self._scales, self._factors, self._row_scale()
        if row_scale is not None:
            chosen = replace(chosen, factor=row_scale)
        A, B = self._encoded()
        if A is not None and B is not None and factors is not None:
            factors = Factors(A.to(factors.A.dtype), B.to(factors.B.dtype), factors.scale)
        chosen = scales.canonical(codes, chosen)
        tuned = QuantizedWeight(codes, chosen, factors, 0.0, None)
        error = relative_error(weight.float() - tuned.dequantize(), weight.float(), None)
        return replace(tuned, weight_error=error)

    def _row_scale(self) -> Tensor | None:
        """`[N, 1]`, bfloat16 values, as the format has them."""
        if self.row_gain is None:
            return None
        moved = self._scales.factor * (1 + self.row_gain)
        return straight(moved, moved.detach().bfloat16().float())

    def _encoded(self) -> tuple[Tensor | None, Tensor | None]:
        """A and B, float32 numbers that the format has."""
        if self.A is None or self.B is None or self._factors is None:
            return None, None
        dtype = self._factors.A.dtype

        def encoded(values: Tensor) -> Tensor:
            kept = values.clamp(-fp8.MAX, fp8.MAX) if dtype == fp8.DTYPE else values
            return straight(kept, kept.detach().to(dtype).float())

        return encoded(self.A), encoded(self.B)


class _Weight(torch.autograd.Function):
    """`value(place) * row_scale + B A`; keeps nothing of the size of the weight for its backward.

    `gradient(shift) = G * slope(place) * row_scale * REACH`, `gradient(row_scale) =
    rowsum(G * value)`, `gradient(A) = B^T G`, `gradient(B) = G A^T`, for the gradient G of the
    weight; the shift is in units of `REACH` here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        module: TunableLinear,
        dtype: torch.dtype,
        handle: Tensor | None,
        row_scale: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
    ) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(row_scale, A, B)
        weight = torch.empty_like(module.start, dtype=dtype)
        for rows in module.grid.slices():
            part = module.grid.value(module.place(rows), rows)
            part = part if row_scale is None else part * row_scale[rows]
            part = part if A is None or B is None else part.addmm(B[rows], A)
            weight[rows] = part
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        module = ctx.module
        saved = ctx.saved_tensors  # once: behind a checkpoint it cannot be asked for again
        row_scale, A, B = saved
        found = [None if value is None else torch.zeros_like(value) for value in saved]
        of_row_scale, of_A, of_B = found
        of_shift = None
        if ctx.needs_input_grad[2]:
            of_shift = torch.empty_like(module.start, dtype=torch.bfloat16)
        for rows in module.grid.slices():
            G, place = gradient[rows].float(), module.place(rows)
            if of_A is not None and of_B is not None:
                of_A.addmm_(B[rows].t(), G)
                of_B[rows] = G @ A.t()
            if of_row_scale is not None:
                of_row_scale[rows] = (module.grid.value(place, rows) * G).sum(1, keepdim=True)
                G = G * row_scale[rows]
            if of_shift is not None:
                of_shift[rows] = G.mul_(module.grid.slope(place, rows)).mul_(REACH)
        return None, None, of_shift, *found


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


def signed(codes: Tensor) -> Tensor:
    """Steps from 0 of codes uint8 `[N, K]`: -7 to 7, int8."""
    steps = (codes & 7).to(torch.int8)
    return torch.where(codes >= 8, -steps, steps)


def _starts(codes: Tensor, doubt: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Places, float16 `[N, K]`, as near to the doubted values as `EDGE` lets them be."""
    starts = torch.empty_like(codes, dtype=torch.float16)
    for rows in grid.slices():
        columns = torch.arange(grid.columns, device=codes.device) // grid.group_size
        exact = grid.place_of(doubt[rows] / scale[rows][:, columns], rows)
        starts[rows] = codes[rows] + (exact - codes[rows]).clamp_(-EDGE, EDGE)
    return starts


def tunables(module: nn.Module) -> list[TunableLinear]:
    """All tunable linears in a module."""
    return [part for part in module.modules() if isinstance(part, TunableLinear)]


def size_of(values: Tensor) -> float:
    """Root mean square, which a learning rate can be a share of."""
    return math.sqrt(float(values.detach().float().square().mean()))
