"""What the kernels for Hopper write, computed in plain torch from what their docstrings say.

Whatever a caller may not rely on is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zqfp_convert.numerics import e2m1, fp8, nibbles
from zqfp_convert.numerics.scales import power_of_two
from zqfp_convert.runtime.kernels.hopper import layout
from zqfp_convert.runtime.kernels.hopper.layout import Chunks
from zqfp_convert.runtime.kernels.hopper.multiply import Schedule, flag_count

NAN = 0x7F  # of E4M3


def scaled_mm(
    a: Tensor,
    b: Tensor,
    *,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    """`torch._scaled_mm` with row-wise scales, held to what it asks for on a GPU."""
    assert a.dtype == b.dtype == torch.float8_e4m3fn
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    assert all(extent % 16 == 0 for extent in (*a.shape, *b.shape))
    assert scale_a.shape == (a.shape[0], 1)
    assert scale_b.shape == (1, b.shape[1])
    assert scale_a.is_contiguous()
    assert scale_b.is_contiguous()
    assert scale_a.dtype == scale_b.dtype == torch.float32
    product = a.float().double() @ b.float().double()
    return (product * scale_a.double() * scale_b.double()).to(out_dtype)


def places(tokens: int) -> Tensor:
    """Where each feature of 128 lies for each token, int64 `[M, 128]`."""
    k = torch.arange(128)
    m = torch.arange(tokens)[:, None]
    return ((k // 16) ^ (m & 7)) * 16 + k % 16


def quantize(
    x: Tensor,
    offset: Tensor | None,
    inner_factor: Tensor | None,
    inner_scale: Tensor | None,
    codes: Tensor,
    token_scale: Tensor,
    inner: Tensor | None,
    flags: Tensor,
) -> None:
    tokens, columns = x.shape
    assert flags.dtype == torch.int32
    flags.zero_()
    assert x.stride(1) == 1
    assert x.dtype in (torch.bfloat16, torch.float16)
    assert offset is None or offset.dtype == torch.bfloat16
    values, scale = fp8.quantize(x.float() if offset is None else x.float() - offset.float())
    width = codes.shape[0] * 128 if codes.dim() == 3 else codes.shape[1]
    written = torch.nn.functional.pad(values.view(torch.uint8), (0, width - columns))
    codes.fill_(NAN)
    if codes.dim() == 3:
        blocks = written.view(tokens, -1, 128).transpose(0, 1)  # [depth, M, 128]
        codes.scatter_(2, places(tokens).expand(blocks.shape), blocks)
    else:
        codes[:tokens] = written
    token_scale.fill_(float("nan"))
    token_scale[:tokens] = scale[:, 0]
    assert (inner is None) == (inner_factor is None) == (inner_scale is None)
    if inner is None or inner_factor is None or inner_scale is None:
        return
    assert inner_factor.dtype == torch.bfloat16
    z = values.float() @ inner_factor[:, :columns].float().t() * scale * inner_scale
    z = z.view(tokens, -1, 8).transpose(0, 1)  # [steps, M, 8]
    high = z.bfloat16()
    low = (z - high.float()).bfloat16()
    swapped = (torch.arange(tokens) >> 2 & 1).bool()[:, None]
    inner[..., :8] = torch.where(swapped, low, high)
    inner[..., 8:] = torch.where(swapped, high, low)


def matrix_of(chunks: Chunks) -> Tensor:
    """Code times 2^(6 - how far its exponent lies below), float32 `[tiles * 64, depth * 128]`."""
    tiles, depth, _ = chunks.data.shape
    rows, columns, step = tiles * 64, depth * 128, 128 // chunks.groups
    packed, below = layout.restore(chunks, rows, columns, step)
    values = e2m1.decode(nibbles.unpack(packed, columns))
    return values * power_of_two(6 - below.int()).repeat_interleave(step, 1)


def multiply(
    codes: Tensor,
    token_scale: Tensor,
    inner: Tensor | None,
    chunks: Chunks,
    outer: Tensor | None,
    row_factor: Tensor,
    bias: Tensor | None,
    y: Tensor,
    schedule: Schedule,
    flags: Tensor,
) -> None:
    assert isinstance(schedule, Schedule)
    tokens, rows = y.shape
    assert flags.shape == (flag_count(schedule, tokens, rows, codes.shape[0], 0),)
    assert not flags.any()
    ordered = (
        codes.gather(2, places(tokens).expand(codes.shape)).transpose(0, 1).reshape(tokens, -1)
    )
    total = ordered.contiguous().view(fp8.DTYPE).float() @ matrix_of(chunks).t()
    total = total * token_scale[:, None] * row_factor
    assert row_factor.shape == (total.shape[1],)
    if inner is not None and outer is not None:
        steps = inner.shape[0]
        split = outer.view(-1, steps, 4, 8, 4, 2, 2)  # tile, step, warp, row, thread, row / 8, rank
        B = split.permute(0, 2, 5, 3, 1, 4, 6).reshape(-1, steps * 8).float()
        z = inner.view(steps, tokens, 2, 8).float().sum(2).transpose(0, 1).reshape(tokens, -1)
        total = total + z @ B.t()
    if bias is not None:
        assert bias.dtype == torch.float32
        total = total + bias
    y.copy_(total[:, :rows])


def expand(chunks: Chunks, matrix: Tensor) -> None:
    rows, columns = matrix.shape
    assert columns % 16 == 0
    codes = fp8.encode(matrix_of(chunks)).view(torch.uint8)
    assert codes.shape[0] >= rows
    assert codes.shape[1] >= columns
    matrix.copy_(codes[:rows, :columns])
