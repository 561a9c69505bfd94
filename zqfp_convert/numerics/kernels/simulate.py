"""What FP8 leaves of activations, in one pass over them: `fp8.simulate`, bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zqfp_convert.numerics.kernels.casts import decode_e4m3, encode_e4m3, narrow, on

LARGEST_TILE = 16384  # columns of a token that one program holds in registers


def simulate(values: Tensor) -> Tensor:
    """Quantize activations `[..., K]` to E4M3 with a scale for each token, and back.

    Any of bfloat16, float16 and float32, which is kept.
    """
    columns = values.shape[-1]
    given = values.reshape(-1, columns)
    given = given if given.stride(1) == 1 else given.contiguous()
    out = torch.empty(given.shape, dtype=values.dtype, device=values.device)
    if len(given):
        tile = min(triton.next_power_of_2(columns), LARGEST_TILE)
        with on(given):
            _simulate[(len(given),)](
                given,
                out,
                columns,
                given.stride(0),
                TILE=tile,
                num_warps=min(max(tile // 512, 1), 16),
            )
    return out.view(values.shape)


@triton.jit
def _simulate(
    x: tl.tensor, out: tl.tensor, columns: tl.tensor, stride: tl.tensor, TILE: tl.constexpr
) -> None:
    """A program does a token; its magnitudes as integers have the floats' order, NaN on top."""
    token = tl.program_id(0).to(tl.int64)
    x += token * stride
    out += token * columns
    ks = tl.arange(0, TILE)
    magnitudes = tl.full((TILE,), 0, tl.int32)
    for start in range(0, columns, TILE):
        values = tl.load(x + start + ks, mask=start + ks < columns, other=0.0).to(tl.float32)
        magnitudes = tl.maximum(magnitudes, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.maximum(tl.max(magnitudes, 0), 0x0D800000)  # 2^-100
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), 448.0)
    for start in range(0, columns, TILE):
        values = tl.load(x + start + ks, mask=start + ks < columns, other=0.0).to(tl.float32)
        kept = decode_e4m3(encode_e4m3(tl.div_rn(values, scale))) * scale
        tl.store(out + start + ks, narrow(kept, out.dtype.element_ty), mask=start + ks < columns)
