"""The number formats that are compared: which values they have, and rounding to the nearest.

Values here are those of the bare format; scales are `placement.py`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A number format, with the scales that belong to it if it prescribes them.

    Attributes:
        bits: of one element.
        largest: the largest value.
        mantissa: bits of mantissa; of no meaning for integers.
        lowest: the exponent of the smallest normal number, so that subnormal ones are
            `2^(lowest - mantissa)` apart; None for integers, which are 1 apart.
        asymmetric: whether the values go from 0 to `largest`, and an offset, itself a multiple of
            the scale, moves them; else they go from `-largest` to `largest`.
        block: elements that share a scale where the format says so, else None.
        block_scale: how these scales are stored: `e8m0` (a power of two) or `e4m3` (times one
            float32 for the whole tensor).
    """

    bits: int
    largest: float
    mantissa: int = 0
    lowest: int | None = None
    asymmetric: bool = False
    block: int | None = None
    block_scale: Literal["e8m0", "e4m3"] | None = None

    @property
    def smallest(self) -> float:
        """The lower end of the values."""
        return 0.0 if self.asymmetric else -self.largest

    def round(self, values: Tensor) -> Tensor:
        """The nearest value of the format to each element; beyond the ends, the end.

        Ties go to the even mantissa (integers: to the even one); without mantissa bits to the
        larger magnitude, but half the smallest becomes 0. NaN stays NaN.

        Args:
            values: float32 of any shape, which is also the result's.
        """
        values = values.clamp(self.smallest, self.largest)
        if self.lowest is None:
            return torch.round(values)
        exponent = ((values.view(torch.int32) >> 23) & 0xFF).clamp_min(self.lowest + 127)
        step = ((exponent - self.mantissa) << 23).view(torch.float32)  # of float32's own fields
        return torch.round(values / step) * step


# E4M3 and E5M2: Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv:2209.05433), table 1.
# E3M4: Shen et al. (arXiv:2309.14592), table 1: one NaN, no infinity, so that its end is 30.
# E2M1 and the MX formats: OCP Microscaling Formats v1.0, 5.3.3 and table 1. E3M0 has its bias, 3,
# and neither NaN nor infinity: 0 and 2^-2 to 2^4, as in ZeroQuant-FP (arXiv:2307.09782).
# NVFP4: blocks of 16 whose scales are E4M3, under one float32 scale for the tensor.
FORMATS: dict[str, Format] = {
    "int8": Format(8, 127.0),
    "int8-asym": Format(8, 255.0, asymmetric=True),
    "int4": Format(4, 7.0),
    "int4-asym": Format(4, 15.0, asymmetric=True),
    "e4m3": Format(8, 448.0, mantissa=3, lowest=-6),
    "e5m2": Format(8, 57344.0, mantissa=2, lowest=-14),
    "e3m4": Format(8, 30.0, mantissa=4, lowest=-2),
    "e2m1": Format(4, 6.0, mantissa=1, lowest=0),
    "e3m0": Format(4, 16.0, mantissa=0, lowest=-2),
    "mxfp8": Format(8, 448.0, mantissa=3, lowest=-6, block=32, block_scale="e8m0"),
    "mxfp4": Format(4, 6.0, mantissa=1, lowest=0, block=32, block_scale="e8m0"),
    "nvfp4": Format(4, 6.0, mantissa=1, lowest=0, block=16, block_scale="e4m3"),
}

NONE = "none"
"""Stands for weights or activations that are left as they are."""

WEIGHTS: tuple[str, ...] = (NONE, *FORMATS)
ACTIVATIONS: tuple[str, ...] = (NONE, "int8", "int8-asym", "e4m3", "e5m2", "e3m4", "mxfp8")
