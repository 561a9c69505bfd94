"""E4M3, the 8-bit floating-point format of activations and low-rank factors, with its scales.

The rule for activations is part of the checkpoint format: every path computes these same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zqfp_convert.numerics import kernels

MAX = 448.0
MIN_ABSMAX = 2.0**-100  # keeps the scale of a token of zeros a positive, normal float32
DTYPE = torch.float8_e4m3fn


def encode(values: Tensor) -> Tensor:
    """Round to E4M3 (nearest, ties to even), saturating at 448; NaN stays NaN.

    Infinities saturate too. Returns float8_e4m3fn of the same shape.
    """
    return values.float().clamp(-MAX, MAX).to(DTYPE)


def decode(codes: Tensor) -> Tensor:
    """The float32 value of each E4M3 element."""
    return codes.to(torch.float32)


def quantize(values: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Quantize to E4M3 with one scale for each slice along `dim`.

    `scale = max(absmax, 2^-100) / 448`, `codes = E4M3(values / scale)`, both in IEEE float32.
    For activations `dim` is the feature dimension, so that each token has a scale. NaN and
    infinity in a slice make its decoded elements NaN.

    Returns:
        codes: float8_e4m3fn, shape of `values`.
        scale: float32, shape of `values` with size 1 at `dim`.
    """
    values = values.float()
    absmax = values.abs().amax(dim, keepdim=True).clamp_min(MIN_ABSMAX)
    scale = absmax / torch.full_like(absmax, MAX)  # on GPUs torch multiplies by a number's inverse
    return encode(values / scale), scale


def simulate(values: Tensor) -> Tensor:
    """What remains of activations `[..., K]` after quantization for each token; dtype is kept."""
    if kernels.take(values):
        from zqfp_convert.numerics.kernels import simulate as fused

        return fused.simulate(values)
    codes, scale = quantize(values)
    return (decode(codes) * scale).to(values.dtype)
