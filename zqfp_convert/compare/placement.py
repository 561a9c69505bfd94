"""Where a format's values lie: the scale and the offset of each group of a matrix's row.

Weights and activations go the same way: `place` a grid under a matrix, then round to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zqfp_convert.compare.formats import Format
from zqfp_convert.numerics import e2m1, fp8, scales
from zqfp_convert.numerics.fp8 import MIN_ABSMAX

ScaleKind = Literal["free", "m1", "m2"]
ScaleRounding = Literal["ceil", "floor", "nearest"]

LEAST_E4M3 = 2.0**-9  # so that an NVFP4 block of tiny values has a scale at all


@dataclass(frozen=True)
class Placement:
    """A grid under each group of a matrix `[N, K]`: values are `scale * format + offset`.

    Attributes:
        format: whose values.
        group: columns that share a scale; the last group may be shorter.
        scale: float32 `[N, G]`.
        offset: float32 `[N, G]`, or None for symmetric formats.
        bits: that all scales and offsets take when stored.
    """

    format: Format
    group: int
    scale: Tensor
    offset: Tensor | None
    bits: int

    def marks(self, columns: Tensor) -> Tensor:
        """The scales `[N, C]` of columns, int64 `[C]`."""
        return self.scale[:, columns // self.group]

    def round(self, values: Tensor, scale: Tensor) -> Tensor:
        """Values without their offset, rounded under scales of the same shape."""
        return self.format.round(values / scale) * scale

    def offsets(self, columns: int) -> Tensor | float:
        """The offset of each element, `[N, columns]`, or 0."""
        if self.offset is None:
            return 0.0
        return _spread(self.offset, self.group, columns)

    def quantize(self, values: Tensor) -> Tensor:
        """The nearest values that can be represented, float32 `[N, K]`."""
        columns = values.shape[1]
        offset = self.offsets(columns)
        return self.round(values - offset, _spread(self.scale, self.group, columns)) + offset


def place(
    values: Tensor,
    format: Format,
    group: int,
    kind: ScaleKind = "free",
    rounding: ScaleRounding = "ceil",
) -> Placement:
    """Put a format's values under a matrix so that they reach from end to end of each group.

    Symmetric: `S = max(absmax, 2^-100) / largest`. Asymmetric: `S = (max - min) / largest` with
    min <= 0 <= max, the offset being the multiple of S nearest to min (Jacob et al.,
    arXiv:1712.05877, section 2). M1 and M2 constrain S as `numerics.scales.choose` does, with
    `ceil` as ZeroQuant-FP (arXiv:2307.09782), section 3, prints them. MX formats take
    `2^(floor(log2 absmax) - emax)` (OCP Microscaling Formats v1.0, 6.3), and NVFP4 takes
    `E4M3(absmax / 6 / T) T` with `T = absmax of the tensor / (6 * 448)`.

    Args:
        values: float32 `[N, K]`, finite.
        format: a format that prescribes its blocks ignores `group`, `kind` and `rounding`.
        group: columns that share a scale.
        kind: `m1` and `m2` are for symmetric formats.
        rounding: of scales to powers of two, under `m1` and `m2`.
    """
    rows = values.shape[0]
    group = min(format.block or group, values.shape[1])
    grouped = _grouped(values, group)  # [N, G, group]
    if format.asymmetric:
        assert kind == "free"
        low, high = grouped.amin(-1).clamp_max(0.0), grouped.amax(-1).clamp_min(0.0)
        return between(low, high, format, group)
    absmax = grouped.abs().amax(-1)  # [N, G]
    count = absmax.numel()
    if format.block_scale == "e8m0":
        scale = _e8m0(absmax, format)
        return Placement(format, group, scale, None, 8 * count)
    if format.block_scale == "e4m3":
        scale = _e4m3(absmax, format)
        return Placement(format, group, scale, None, 8 * count + 32)
    if kind == "free":
        return between(-absmax, absmax, format, group)
    chosen = scales.choose(values * (e2m1.MAX / format.largest), kind, rounding, group)
    bits = 8 * count + (16 * rows if kind == "m2" else 0)
    return Placement(format, group, chosen.per_group(), None, bits)


def between(low: Tensor, high: Tensor, format: Format, group: int) -> Placement:
    """The free scales and offsets that reach from `low` to `high`, both float32 `[N, G]`.

    For symmetric formats the larger magnitude of the two counts.
    """
    largest = torch.full_like(low, format.largest)  # on GPUs dividing by a number is inexact
    if not format.asymmetric:
        scale = torch.maximum(-low, high).clamp_min(MIN_ABSMAX) / largest
        return Placement(format, group, scale, None, 16 * scale.numel())
    scale = (high - low).clamp_min(MIN_ABSMAX) / largest
    offset = torch.round(low / scale) * scale
    return Placement(format, group, scale, offset, (16 + format.bits) * scale.numel())


def _e8m0(absmax: Tensor, format: Format) -> Tensor:
    exponent = torch.frexp(absmax.clamp_min(MIN_ABSMAX))[1] - 1  # floor(log2)
    emax = math.frexp(format.largest)[1] - 1
    return scales.power_of_two((exponent - emax).clamp(-127, 127))


def _e4m3(absmax: Tensor, format: Format) -> Tensor:
    whole = absmax.max().clamp_min(MIN_ABSMAX) / (format.largest * fp8.MAX)
    stored = fp8.decode(fp8.encode(absmax / format.largest / whole))
    return stored.clamp_min(LEAST_E4M3) * whole


def _grouped(values: Tensor, group: int) -> Tensor:
    """`[N, K]` to `[N, G, group]`; the last group is filled up with its own last element."""
    missing = -values.shape[1] % group
    if missing:
        values = torch.cat([values, values[:, -1:].expand(-1, missing)], 1)
    return values.view(len(values), -1, group)


def _spread(per_group: Tensor, group: int, columns: int) -> Tensor:
    """`[N or 1, G]` to `[N or 1, columns]`."""
    if per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(group, 1)[:, :columns]
