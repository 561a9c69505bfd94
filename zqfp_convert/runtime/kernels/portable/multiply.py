"""The fused multiplication: packed weights become FP8 in registers and meet FP8 activations.

A program computes a tile of Y^T = W X^T, so that the weights, which are made in registers, are the
operand that tensor cores take from there.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from zqfp_convert.numerics import codebook, fp8
from zqfp_convert.numerics.codebook import Codebook
from zqfp_convert.numerics.kernels.casts import dot_e4m3, narrow, on
from zqfp_convert.runtime import expanded
from zqfp_convert.runtime.kernels.portable import layout, tiles, unpack
from zqfp_convert.runtime.kernels.portable.tiles import Tiles

PROCESSORS = 132  # assumed where there is no GPU to ask


def multiply(
    codes: Tensor,
    scale: Tensor,
    weights: Tensor,
    shifts: Tensor,
    group_size: int,
    factor: Tensor,
    lorc: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    chosen: Tiles | None = None,
    books: tuple[Codebook, ...] = (codebook.E2M1,),
) -> Tensor:
    """`y = factor * scale * (W codes) + B z + bias`, the sums in float32.

    Args:
        codes: float8_e4m3fn `[M, K']`, and
        scale: float32 `[M]`, from `quantize`.
        weights: uint8 `[N, K' / 2]`, and
        shifts: uint8 `[N, G']`, from `layout.arrange`.
        group_size: as it was given to `arrange`.
        factor: float32 `[N]`, from `expanded.row_factor`.
        lorc: `B [N, r]`, float8_e4m3fn or bfloat16, and z, float32 `[M, r]`.
        bias: `[N]`, any floating dtype.
        dtype: of y: bfloat16, float16 or float32.
        chosen: the tiles, where they are not to be chosen from the shape.
        books: what the codes stand for.

    Returns:
        `[M, N]`.
    """
    tokens, width = codes.shape
    rows, blocks = weights.shape[0], width // layout.BLOCK
    y = torch.empty(tokens, rows, dtype=dtype, device=codes.device)
    if not tokens:
        return y
    chosen = chosen or tiles.choose(tokens, rows, blocks, _processors(codes.device))
    B, z = (None, None) if lorc is None else lorc
    rank = 0 if B is None else B.shape[1]
    sums = None
    if chosen.splits > 1:
        shape = (chosen.splits, tokens, rows)
        sums = torch.empty(shape, dtype=torch.float32, device=codes.device)
    row_tiles, token_tiles = triton.cdiv(rows, chosen.rows), triton.cdiv(tokens, chosen.tokens)
    first, second = unpack.table(books)
    # Triton keeps one compiled program for each of these settings, not for each shape.
    epilogue = {
        "ROWS": chosen.rows,
        "TOKENS": chosen.tokens,
        "RANK": max(triton.next_power_of_2(rank), 16) if rank else 0,
        "BIAS": bias is not None,
    }
    with on(codes):
        _multiply[(row_tiles * token_tiles, chosen.splits)](
            codes.view(torch.uint8),
            scale,
            weights,
            shifts,
            factor,
            B,
            z,
            bias,
            y,
            sums,
            tokens,
            rows,
            blocks,
            shifts.shape[1],
            rank,
            GROUP=width if shifts.shape[1] == 1 else group_size,
            BAND=chosen.band,
            SPLITS=chosen.splits,
            FAST=unpack.fast(books),
            FIRST=first,
            SECOND=second,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            **epilogue,
        )
        if sums is not None:
            _add_up[(row_tiles, token_tiles)](
                sums,
                scale,
                factor,
                B,
                z,
                bias,
                y,
                tokens,
                rows,
                rank,
                SPLITS=chosen.splits,
                num_warps=4,
                **epilogue,
            )
    return y


def multiply_twin(
    codes: Tensor,
    scale: Tensor,
    weights: Tensor,
    shifts: Tensor,
    group_size: int,
    factor: Tensor,
    lorc: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    books: tuple[Codebook, ...] = (codebook.E2M1,),
) -> Tensor:
    """`multiply` in plain torch; sums in another order."""
    matrix = layout.matrix_of(weights, shifts, group_size, books, expanded.TOP_SHIFT)
    y = fp8.decode(codes) @ matrix.t() * factor * scale[:, None]
    if lorc is not None:
        B, z = lorc
        y = y + z @ B.float().t()
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _multiply(
    codes: tl.tensor,
    scale: tl.tensor,
    weights: tl.tensor,
    shifts: tl.tensor,
    factor: tl.tensor,
    B: tl.tensor,
    z: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    sums: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    blocks: tl.tensor,
    groups: tl.tensor,
    rank: tl.tensor,
    GROUP: tl.constexpr,
    BAND: tl.constexpr,
    SPLITS: tl.constexpr,
    FAST: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    BIAS: tl.constexpr,
) -> None:
    """Program (t, s) sums the share s of the columns for tile t of Y^T."""
    row_tiles = (rows + ROWS - 1) // ROWS
    token_tiles = (tokens + TOKENS - 1) // TOKENS
    tile = tl.program_id(0)
    band_start = tile // (BAND * row_tiles) * BAND
    band = tl.minimum(token_tiles - band_start, BAND)
    token_tile = band_start + tile % (BAND * row_tiles) % band
    row_tile = tile % (BAND * row_tiles) // band
    n = row_tile * ROWS + tl.arange(0, ROWS)
    m = token_tile * TOKENS + tl.arange(0, TOKENS)
    # Beyond the last row or token the last one is read again, and not stored: loads need no mask.
    n_read = tl.minimum(n, rows - 1).to(tl.int64)
    m_read = tl.minimum(m, tokens - 1).to(tl.int64)
    ks = tl.arange(0, 64)
    w = weights + n_read[:, None] * (blocks * 64) + ks[None, :]  # [ROWS, 64]
    x = codes + m_read[None, :] * (blocks * 128) + ks[:, None]  # [64, TOKENS]
    shift = shifts + n_read * groups  # [ROWS]
    part = tl.program_id(1)
    share = (blocks + SPLITS - 1) // SPLITS
    total = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    for block in range(part * share, tl.minimum(part * share + share, blocks)):
        packed = tl.load(w + block * 64)
        x_low = tl.load(x + block * 128)
        x_high = tl.load(x + block * 128 + 64)
        low_shift, high_shift = unpack.block_shifts(shift, block, GROUP)
        low, high = unpack.unpack(packed, low_shift, high_shift, FAST, FIRST, SECOND)
        total = dot_e4m3(low, x_low, total)
        total = dot_e4m3(high, x_high, total)
    if SPLITS == 1:
        _finish(total, n, m, scale, factor, B, z, bias, y, tokens, rows, rank, RANK, BIAS)
    else:
        place = (part * tokens + m)[None, :].to(tl.int64) * rows + n[:, None]
        tl.store(sums + place, total, mask=(m < tokens)[None, :] & (n < rows)[:, None])


@triton.jit
def _add_up(
    sums: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    B: tl.tensor,
    z: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    rank: tl.tensor,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    BIAS: tl.constexpr,
) -> None:
    """Add the shares of a tile in their order, so that equal inputs give equal bits."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    kept = (m < tokens)[None, :] & (n < rows)[:, None]
    total = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    for part in tl.static_range(SPLITS):
        place = (part * tokens + m)[None, :].to(tl.int64) * rows + n[:, None]
        total += tl.load(sums + place, mask=kept, other=0.0)
    _finish(total, n, m, scale, factor, B, z, bias, y, tokens, rows, rank, RANK, BIAS)


@triton.jit
def _finish(
    total: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    B: tl.tensor,
    z: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    rank: tl.tensor,
    RANK: tl.constexpr,
    BIAS: tl.constexpr,
) -> None:
    """Apply factor, scale, low-rank product and bias to a tile `[ROWS, TOKENS]`, and store it."""
    kept = (m < tokens)[None, :] & (n < rows)[:, None]
    n_read = tl.minimum(n, rows - 1)
    m_read = tl.minimum(m, tokens - 1)
    total = total * tl.load(factor + n_read)[:, None] * tl.load(scale + m_read)[None, :]
    if RANK > 0:
        r = tl.arange(0, RANK)
        b_place = n_read[:, None].to(tl.int64) * rank + r[None, :]
        z_place = m_read[None, :].to(tl.int64) * rank + r[:, None]
        b = tl.load(B + b_place, mask=(r < rank)[None, :], other=0.0).to(tl.float32)
        inner = tl.load(z + z_place, mask=(r < rank)[:, None], other=0.0)
        # B is a TF32 number, z the sum of two to float32's own precision but 2 bits.
        total = tl.dot(b, inner, total, input_precision="tf32x3")
    if BIAS:
        total += tl.load(bias + n_read).to(tl.float32)[:, None]
    place = m[None, :].to(tl.int64) * rows + n[:, None]
    tl.store(y + place, narrow(total, y.dtype.element_ty), mask=kept)
