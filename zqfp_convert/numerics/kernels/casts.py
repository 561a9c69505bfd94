"""Casts inside the kernels: E4M3 bytes, the narrow output formats, and where a kernel runs.

The tile of a kernel keeps E4M3 as uint8. On a GPU its conversions are used; Triton's interpreter
converts to bfloat16 and E4M3 inexactly (3.6), so there integers do it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# Read once, when the kernels below are compiled or made interpreted functions.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the GPU of a tensor the current one, as Triton's launches need it."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def encode_e4m3(values: tl.tensor) -> tl.tensor:
    """float32 of magnitude at most 448 (1 + 2^-23), or NaN, to the nearest E4M3 byte, ties even."""
    if INTERPRETED:
        bits = values.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Round at the third mantissa bit; then the exponent's bias goes from 127 to 7.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
        # The spacing of float32 at 2^14 is 2^-9, that of E4M3 below its normal numbers.
        nudged = magnitude.to(tl.float32, bitcast=True) + 16384.0
        subnormal = nudged.to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < 0x3C800000, subnormal, normal)  # 2^-6
        code = tl.where(magnitude > 0x7F800000, 0x7F, code)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        return values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def decode_e4m3(codes: tl.tensor) -> tl.tensor:
    """E4M3 bytes to float32, exactly."""
    if INTERPRETED:
        magnitude = codes.to(tl.int32) & 0x7F
        values = (magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        values = tl.where(magnitude == 0x7F, float("nan"), values)
        return tl.where(codes > 0x7F, -values, values)
    else:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def narrow(values: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """float32 to the output's dtype, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(dtype)


@triton.jit
def dot_e4m3(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    """`total + a b` for E4M3 bytes `[R, C]` and `[C, T]`, float32 `[R, T]`."""
    if INTERPRETED:  # whose own product takes E4M3's NaN for 480
        return tl.dot(decode_e4m3(a), decode_e4m3(b), total, input_precision="ieee")
    else:
        return tl.dot(a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True), total)
