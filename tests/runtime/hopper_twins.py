"""What the kernels for Hopper write, computed in plain torch from what their docstrings say.

Whatever a caller may not rely on is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from zqfp_convert.numerics import codebook, fp8
from zqfp_convert.numerics.scales import power_of_two
from zqfp_convert.runtime.kernels.hopper import layout
from zqfp_convert.runtime.kernels.hopper.layout import Chunks
from zqfp_convert.runtime.kernels.hopper.multiply import (
    SHARED_LIMIT,
    Inputs,
    Matrix,
    Schedule,
    flag_count,
    inner_parts,
)

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
    inner_factors: Sequence[Tensor],
    inner_scales: Sequence[Tensor],
    codes: Tensor,
    token_scale: Tensor,
    inner: Tensor | None,
    flags: Tensor | None,
) -> None:
    tokens, columns = x.shape
    if flags is not None:
        assert flags.dtype == torch.int32
        flags.zero_()
    assert x.stride(1) == 1
    assert x.dtype in (torch.bfloat16, torch.float16)
    assert offset is None or offset.dtype == torch.bfloat16
    values, scale = fp8.quantize(x.float() if offset is None else x.float() - offset.float())
    width = {2: codes.shape[1], 3: codes.shape[0] * 128, 4: codes.shape[0] * 512}[codes.dim()]
    written = torch.nn.functional.pad(values.view(torch.uint8), (0, width - columns))
    codes.fill_(NAN)
    if codes.dim() == 4:
        # Chunks that are not there stay as they are: the product has to know.
        pieces = written.view(tokens, -1, 8, 16)[:, : -(-columns // 128)]
        for m, chunk, piece in product(range(tokens), range(pieces.shape[1]), range(8)):
            row = 4 * m + chunk % 4
            codes[chunk // 4, row, piece ^ (row & 7)] = pieces[m, chunk, piece]
    elif codes.dim() == 3:
        blocks = written.view(tokens, -1, 128).transpose(0, 1)  # [depth, M, 128]
        codes.scatter_(2, places(tokens).expand(blocks.shape), blocks)
    else:
        codes[:tokens] = written
    token_scale.fill_(float("nan"))
    token_scale[:tokens] = scale[:, 0]
    assert len(inner_factors) == len(inner_scales)
    assert (inner is None) == (not inner_factors)
    if inner is None:
        return
    assert all(factor.dtype == torch.bfloat16 for factor in inner_factors)
    A, s = torch.cat([*inner_factors]), torch.cat([*inner_scales])
    z = values.float() @ A[:, :columns].float().t() * scale * s
    z = z.view(tokens, -1, 8).transpose(0, 1)  # [steps, M, 8]
    parts = inner.shape[0]
    assert parts == inner_parts(tokens)
    share = torch.arange(1.0, parts + 1)
    z = z * (share / share.sum())[:, None, None, None]
    assert inner.shape[:3] == z.shape[:3]
    high = z.bfloat16()
    low = (z - high.float()).bfloat16()
    swapped = (torch.arange(tokens) >> 2 & 1).bool()[:, None]
    inner[..., :8] = torch.where(swapped, low, high)
    inner[..., 8:] = torch.where(swapped, high, low)


def matrix_of(chunks: Chunks) -> Tensor:
    """Code times 2^(6 - how far its exponent lies below), float32 `[tiles * 64, depth * 128]`."""
    step = 128 // chunks.groups
    codes, marks = layout._restore(chunks.data, chunks.groups)
    values = codebook.decode(codes, chunks.books[0])
    if len(chunks.books) > 1:
        second = (marks >= 128).repeat_interleave(step, 1)
        values = torch.where(second, codebook.decode(codes, chunks.books[1]), values)
    return values * power_of_two((marks & 127).int() - 5).repeat_interleave(step, 1)


def in_order(codes: Tensor) -> Tensor:
    """E4M3 `[M, K']` of what `quantize` writes for the fused product."""
    tokens = codes.shape[1]
    ordered = codes.gather(2, places(tokens).expand(codes.shape)).transpose(0, 1)
    return ordered.reshape(tokens, -1).contiguous().view(fp8.DTYPE)


def decode(inputs: Inputs, matrices: Sequence[Matrix]) -> None:
    tokens, depth = matrices[0].y.shape[0], matrices[0].chunks.data.shape[1]
    units, columns, _, _ = inputs.codes.shape
    assert (units, columns) == (-(-depth // 4), max(8, 4 << (tokens - 1).bit_length()))
    assert inputs.token_scale.shape == (-(-tokens // 4) * 4,)
    values = torch.empty(tokens, depth, 8, 16, dtype=torch.uint8)
    for m, chunk, piece in product(range(tokens), range(depth), range(8)):
        row = 4 * m + chunk % 4
        values[m, chunk, piece] = inputs.codes[chunk // 4, row, piece ^ (row & 7)]
    _multiply(values.view(tokens, -1).view(fp8.DTYPE), inputs, matrices)


def multiply(inputs: Inputs, matrices: Sequence[Matrix], schedule: Schedule, flags: Tensor) -> None:
    tokens, depth = matrices[0].y.shape[0], matrices[0].chunks.data.shape[1]
    assert schedule.shared(matrices[0].chunks.groups) <= SHARED_LIMIT
    rows = tuple(matrix.y.shape[1] for matrix in matrices)
    assert flags.shape == (flag_count(schedule, tokens, rows, depth, 0),)
    assert not flags.any()
    _multiply(in_order(inputs.codes), inputs, matrices)


def _multiply(values: Tensor, inputs: Inputs, matrices: Sequence[Matrix]) -> None:
    tokens = values.shape[0]
    scale, inner = inputs.token_scale[:tokens, None], inputs.inner
    step = 0
    for matrix in matrices:
        total = values.float() @ matrix_of(matrix.chunks).t() * scale * matrix.row_factor
        z = None
        if inner is not None:
            own = inner[:, step : step + matrix.steps]
            z = own.view(len(inner), -1, tokens, 2, 8).float().sum((0, 3))
            z = z.transpose(0, 1).reshape(tokens, -1)
        step += matrix.steps
        if z is not None:
            assert matrix.outer is not None
            outer = matrix.outer.view(-1, matrix.steps, 4, 8, 4, 2, 2)  # ..., row / 8, rank
            B = outer.permute(0, 2, 5, 3, 1, 4, 6).reshape(-1, matrix.steps * 8).float()
            total = total + z @ B.t()
        if matrix.bias is not None:
            assert matrix.bias.dtype == torch.float32
            total = total + matrix.bias
        matrix.y.copy_(total[:, : matrix.y.shape[1]])


def expand(chunks: Chunks, matrix: Tensor) -> None:
    rows, columns = matrix.shape
    assert columns % 16 == 0
    codes = fp8.encode(matrix_of(chunks)).view(torch.uint8)
    assert codes.shape[0] >= rows
    assert codes.shape[1] >= columns
    matrix.copy_(codes[:rows, :columns])
