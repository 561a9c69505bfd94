"""Activations to E4M3 with a scale for each token, and their low-rank products.

The bytes and scales are those of `numerics.fp8.quantize`, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zqfp_convert.numerics import fp8
from zqfp_convert.numerics.kernels.casts import INTERPRETED, decode_e4m3, encode_e4m3, narrow, on
from zqfp_convert.runtime.kernels.portable import layout

LARGEST_TILE = 16384  # columns of a token that one program holds in registers
BY_TOKEN = 1024  # products z that are computed one to a program; with more the tensor cores do it


class Quantized(NamedTuple):
    """Activations `x^ = codes * scale` and what the low-rank factors need of them.

    Attributes:
        codes: float8_e4m3fn `[M, K']`, zeros beyond K.
        scale: float32 `[M]`.
        z: float32 `[M, r]`, `s * (A x^)`, or None without factors. In parts: bfloat16 `[M, 2r]`,
            what bfloat16 keeps of it and then, with 8 bits more, what that leaves.
    """

    codes: Tensor
    scale: Tensor
    z: Tensor | None


def quantize(
    x: Tensor,
    input_offset: Tensor | None = None,
    lorc: tuple[Tensor, Tensor | None] | None = None,
    *,
    parts: bool = False,
) -> Quantized:
    """Quantize activations; `scale = max(absmax, 2^-100) / 448`, `codes = E4M3(x / scale)`.

    Args:
        x: `[M, K]`, bfloat16, float16 or float32.
        input_offset: `[K]`, any of these dtypes, subtracted from x in float32 first.
        lorc: `A [r, K]`, float8_e4m3fn or bfloat16, and its scales s, float32 `[r]`, or None.
        parts: whether z comes as two parts, which the tensor cores can multiply on with.
    """
    tokens, columns = x.shape
    width = layout.padded(columns)
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty(tokens, width, dtype=torch.uint8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    A, A_scale = (None, None) if lorc is None else lorc
    rank = 0 if A is None else A.shape[0]
    if parts:
        z = torch.empty(tokens, 2 * rank, dtype=torch.bfloat16, device=x.device)
    else:
        z = torch.empty(tokens, rank, dtype=torch.float32, device=x.device)
    by_token = 0 < tokens * rank <= BY_TOKEN and not parts
    if tokens:
        tile = min(triton.next_power_of_2(width), LARGEST_TILE)
        with on(x):
            _quantize[(tokens, rank if by_token else 1)](
                x,
                input_offset,
                codes,
                scale,
                A,
                A_scale,
                z,
                columns,
                width,
                x.stride(0),
                TILE=tile,
                WHOLE=width <= tile,
                OFFSET=input_offset is not None,
                LORC=by_token,
                SCALED=A_scale is not None,
                num_warps=min(max(tile // 512, 1), 16),
            )
            if rank and not by_token:
                tile_tokens = 16 if tokens <= 4096 else 64
                _project[(triton.cdiv(tokens, tile_tokens),)](
                    codes,
                    scale,
                    A,
                    A_scale,
                    z,
                    tokens,
                    columns,
                    width // layout.BLOCK,
                    rank,
                    TOKENS=tile_tokens,
                    RANK=max(triton.next_power_of_2(rank), 16),
                    SCALED=A_scale is not None,
                    PARTS=parts,
                    num_warps=4,
                    num_stages=4,
                )
    return Quantized(codes.view(fp8.DTYPE), scale, z if rank else None)


def quantize_twin(
    x: Tensor,
    input_offset: Tensor | None = None,
    lorc: tuple[Tensor, Tensor | None] | None = None,
    *,
    parts: bool = False,
) -> Quantized:
    """`quantize` in plain torch; z sums in another order."""
    seen = x.float() if input_offset is None else x.float() - input_offset.float()
    codes, scale = fp8.quantize(seen)  # [M, K], [M, 1]
    z = None
    if lorc is not None and lorc[0].shape[0]:
        A, A_scale = lorc
        z = fp8.decode(codes) @ A.float().t() * scale
        z = z if A_scale is None else z * A_scale
        if parts:
            high = z.bfloat16()
            z = torch.cat([high, (z - high.float()).bfloat16()], 1)
    missing = layout.padded(x.shape[1]) - x.shape[1]
    codes = torch.nn.functional.pad(codes.view(torch.uint8), (0, missing)).view(fp8.DTYPE)
    return Quantized(codes, scale[:, 0], z)


@triton.jit
def _quantize(
    x: tl.tensor,
    input_offset: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    A: tl.tensor,
    A_scale: tl.tensor,
    z: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    OFFSET: tl.constexpr,
    LORC: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    """Program (m, j) quantizes token m and multiplies it with row j of A; j = 0 stores the codes.

    To quantize a token once for each rank costs less than a second launch while tokens are few.
    """
    token = tl.program_id(0).to(tl.int64)
    rank = tl.program_id(1)
    x += token * x_stride
    codes += token * width
    ks = tl.arange(0, TILE)
    # As integers magnitudes have the order of the floats, with infinity and NaN on top, so that
    # the largest is NaN where there is one.
    if WHOLE:
        values = _seen(x, input_offset, ks, columns, OFFSET)
        magnitudes = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        magnitudes = tl.full((TILE,), 0, tl.int32)
        for start in range(0, columns, TILE):
            values = _seen(x, input_offset, start + ks, columns, OFFSET)
            magnitudes = tl.maximum(magnitudes, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.maximum(tl.max(magnitudes, 0), 0x0D800000)  # 2^-100
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), 448.0)
    if rank == 0:
        tl.store(scales + token, scale)
    if WHOLE:
        total = _store_and_multiply(values, scale, codes, A, ks, columns, width, rank, LORC)
    else:
        total = tl.full((TILE,), 0.0, tl.float32)
        for start in range(0, width, TILE):
            again = _seen(x, input_offset, start + ks, columns, OFFSET)
            total += _store_and_multiply(
                again, scale, codes, A, start + ks, columns, width, rank, LORC
            )
    if LORC:
        product = tl.sum(total, 0) * scale
        if SCALED:
            product *= tl.load(A_scale + rank)
        tl.store(z + token * tl.num_programs(1) + rank, product)


@triton.jit
def _seen(
    x: tl.tensor, offset: tl.tensor, ks: tl.tensor, columns: tl.tensor, OFFSET: tl.constexpr
) -> tl.tensor:
    """The activations of a token at columns ks, float32, 0 beyond the row."""
    values = tl.load(x + ks, mask=ks < columns, other=0.0).to(tl.float32)
    if OFFSET:
        values -= tl.load(offset + ks, mask=ks < columns, other=0.0).to(tl.float32)
    return values


@triton.jit
def _store_and_multiply(
    values: tl.tensor,
    scale: tl.tensor,
    codes: tl.tensor,
    A: tl.tensor,
    ks: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    LORC: tl.constexpr,
) -> tl.tensor:
    """Store a token's codes at columns ks; the terms of its product with row `rank` of A."""
    byte = encode_e4m3(tl.div_rn(values, scale))
    byte = tl.where(ks < columns, byte, 0)  # 0 / NaN is not 0
    if rank == 0:
        tl.store(codes + ks, byte, mask=ks < width)
    if LORC:
        row = tl.load(A + rank * columns + ks, mask=ks < columns, other=0.0).to(tl.float32)
        return row * decode_e4m3(byte)
    else:
        return values


@triton.jit
def _project(
    codes: tl.tensor,
    scales: tl.tensor,
    A: tl.tensor,
    A_scale: tl.tensor,
    z: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    blocks: tl.tensor,
    rank: tl.tensor,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    SCALED: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """A program computes z for a tile of tokens, in bfloat16, which holds codes and A exactly."""
    m = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    r = tl.arange(0, RANK)
    ks = tl.arange(0, 128)
    kept = (m < tokens)[:, None] & (r < rank)[None, :]
    m = tl.minimum(m, tokens - 1)
    x = codes + m[:, None].to(tl.int64) * (blocks * 128) + ks[None, :]  # [TOKENS, 128]
    a = A + r[None, :] * columns + ks[:, None]  # [128, RANK]
    total = tl.full((TOKENS, RANK), 0.0, tl.float32)
    for block in range(blocks):
        seen = decode_e4m3(tl.load(x + block * 128))
        mask = (r < rank)[None, :] & (block * 128 + ks < columns)[:, None]
        factor = tl.load(a + block * 128, mask=mask, other=0.0).to(tl.float32)
        if INTERPRETED:  # it has no product of bfloat16
            total = tl.dot(seen, factor, total, input_precision="ieee")
        else:
            total = tl.dot(seen.to(tl.bfloat16), factor.to(tl.bfloat16), total)
    total *= tl.load(scales + m)[:, None]
    if SCALED:
        total *= tl.load(A_scale + r, mask=r < rank, other=0.0)[None, :]
    if PARTS:
        z += m[:, None].to(tl.int64) * (2 * rank) + r[None, :]
        high = narrow(total, tl.bfloat16)
        tl.store(z, high, mask=kept)
        tl.store(z + rank, narrow(total - high.to(tl.float32), tl.bfloat16), mask=kept)
    else:
        tl.store(z + m[:, None].to(tl.int64) * rank + r[None, :], total, mask=kept)
