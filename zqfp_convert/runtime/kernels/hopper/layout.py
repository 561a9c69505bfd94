"""How weights and factors lie in GPU memory for the Hopper kernels: in the tensor cores' own order.

A chunk is 64 rows by 128 columns, the weights that a warpgroup multiplies from one stage of the
pipeline. Thread `32 w + 4 g + t` holds rows `16 w + g` and 8 below it, and of 32 neighbouring
columns `4 t` to `4 t + 3` and 16 further (PTX ISA, register fragments of wgmma .m64nNk32). A chunk
is `[2 halves of K, 128 threads, 4 words]` and then the lifts `[32 pairs of rows, groups, 2 rows]`.
A word is 8 weights of a row: magnitudes in the low three bits of its nibbles, in order of columns,
and signs where the conversion to E4M3 wants them (`to_e4m3` in codebook.cuh).

A lift is `11 - (b_max - b)`: how far a group's exponent lies above the lowest that fits. Its
highest bit says that the group has the second of two codebooks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zqfp_convert.numerics import bits, codebook, nibbles
from zqfp_convert.numerics.codebook import Codebook
from zqfp_convert.numerics.scales import MAX_SPAN
from zqfp_convert.runtime.kernels.hopper.books import SECOND

ROWS, COLUMNS = 64, 128  # of a chunk
CODES_BYTES = ROWS * COLUMNS // 2
RANKS = 8  # in one step of low-rank compensation
MOST_RANKS = 40  # of the weights in one launch: quantize.cu has room for as many factors
PART = 1 << 24  # weights arranged at a time, to bound the temporary memory


@dataclass(frozen=True)
class Chunks:
    """A layer's weights.

    Attributes:
        data: uint8 `[ceil(N / 64), ceil(K / 128), chunk bytes]`.
        groups: scales for 128 columns: 1, 2 or 4.
        books: what the codes stand for.
    """

    data: Tensor
    groups: int
    books: tuple[Codebook, ...] = (codebook.E2M1,)


def supports(group_size: int, columns: int) -> bool:
    """Whether 32 neighbouring columns share a scale: what a tensor-core operation takes at once."""
    return group_size % 32 == 0 or group_size >= columns


def groups_in_chunk(group_size: int, columns: int) -> int:
    """Scales for 128 columns: 1, 2 or 4."""
    if group_size >= columns or group_size % 128 == 0:
        return 1
    return 2 if group_size % 64 == 0 else 4


def chunk_bytes(groups: int) -> int:
    """The bytes of a chunk."""
    return CODES_BYTES + ROWS * groups


def arrange(
    packed: Tensor,
    exponents: Tensor,
    group_size: int,
    columns: int,
    books: tuple[Codebook, ...] = (codebook.E2M1,),
    choice: Tensor | None = None,
) -> Chunks:
    """Chunks of a layer.

    Args:
        packed: uint8 `[N, ceil(K / 2)]`, as on disk.
        exponents: uint8 `[N, G]`, E8M0 bytes with a span of at most 11.
        group_size: a multiple of 32, or K.
        columns: K.
        books, choice: as in `PackedLayer`.
    """
    groups = groups_in_chunk(group_size, columns)
    tiles, depth = -(-packed.shape[0] // ROWS), -(-columns // COLUMNS)
    data = packed.new_empty(tiles, depth, chunk_bytes(groups))
    step = max(1, PART // (ROWS * depth * COLUMNS))
    second = None if choice is None else bits.unpack(choice, packed.shape[0])
    for start in range(0, tiles, step):
        rows = slice(start * ROWS, (start + step) * ROWS)
        part = data[start : start + step]
        codes = nibbles.unpack(packed[rows], columns)
        lifts = MAX_SPAN - (exponents[rows].amax(1, keepdim=True) - exponents[rows])
        if second is not None:
            lifts |= SECOND * second[rows].to(torch.uint8)
        _arrange(codes, lifts, group_size, groups, part)
    return Chunks(data, groups, books)


def _arrange(codes: Tensor, lifts: Tensor, group_size: int, groups: int, out: Tensor) -> None:
    tiles, depth, _ = out.shape
    rows, columns = tiles * ROWS, depth * COLUMNS
    missing = (0, columns - codes.shape[1], 0, rows - codes.shape[0])
    codes = torch.nn.functional.pad(codes, missing)
    # tile, warp, row / 8, row, | chunk, half, step, last, thread, column
    split = codes.view(tiles, 4, 2, 8, depth, 2, 2, 2, 4, 4).to(torch.int32)
    ordered = split.permute(0, 4, 5, 1, 3, 8, 6, 2, 7, 9)  # ..., step, row / 8, last, column
    place = torch.arange(4, device=codes.device, dtype=torch.int32)
    words = ((ordered[..., 0, :] & 7) << 4 * place).sum(-1)
    words += ((ordered[..., 1, :] & 7) << 4 * place + 16).sum(-1)
    words += ((ordered[..., 0, :] >> 3) << 8 * place + 7).sum(-1)
    words += ((ordered[..., 1, :] >> 3) << 8 * place + 3).sum(-1)
    low = words & 0xFFFFFFFF
    low = torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)
    out[..., :CODES_BYTES] = low.contiguous().view(torch.uint8).view(tiles, depth, CODES_BYTES)

    per_group = COLUMNS // groups
    first = torch.arange(0, columns, per_group, device=codes.device)  # of each stretch
    stretch = lifts[:, (first // group_size).clamp_max(lifts.shape[1] - 1)]
    stretch = torch.nn.functional.pad(stretch, (0, 0, 0, rows - lifts.shape[0]), value=MAX_SPAN)
    pairs = stretch.view(tiles, 4, 2, 8, depth, groups).permute(0, 4, 1, 3, 5, 2)
    out[..., CODES_BYTES:] = pairs.reshape(tiles, depth, ROWS * groups)


def restore(chunks: Chunks, rows: int, columns: int, group_size: int) -> tuple[Tensor, Tensor]:
    """The inverse of `arrange`.

    Returns:
        packed: uint8 `[N, ceil(K / 2)]`.
        below: uint8 `[N, G]`, how far each group's exponent lies below its row's largest.
    """
    tiles, depth, _ = chunks.data.shape
    width = COLUMNS // chunks.groups  # columns from one lift to the next
    starts = torch.arange(0, columns, min(group_size, columns), device=chunks.data.device)
    packed, below = [], []
    step = max(1, PART // (ROWS * depth * COLUMNS))
    for start in range(0, tiles, step):
        codes, lifts = _restore(chunks.data[start : start + step], chunks.groups)
        kept = rows - start * ROWS
        packed.append(nibbles.pack(codes[:kept, :columns]))
        below.append(MAX_SPAN - (lifts[:kept, starts // width] & ~SECOND))
    return torch.cat(packed), torch.cat(below)


def _restore(data: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 `[tiles * 64, depth * 128]`, lifts uint8 `[tiles * 64, depth * groups]`."""
    tiles, depth, _ = data.shape
    words = data[..., :CODES_BYTES].contiguous().view(torch.int32)
    words = words.view(tiles, depth, 2, 4, 8, 4, 2, 2, 1)
    place = torch.arange(4, device=data.device, dtype=torch.int32)
    first = (words >> 4 * place & 7) | (words >> 8 * place + 7 & 1) << 3
    last = (words >> 4 * place + 16 & 7) | (words >> 8 * place + 3 & 1) << 3
    ordered = torch.stack([first, last], -2).to(torch.uint8)
    codes = ordered.permute(0, 3, 7, 4, 1, 2, 6, 8, 5, 9)
    pairs = data[..., CODES_BYTES:].reshape(tiles, depth, 4, 8, groups, 2)
    lifts = pairs.permute(0, 2, 5, 3, 1, 4)
    return (
        codes.reshape(tiles * ROWS, depth * COLUMNS),
        lifts.reshape(tiles * ROWS, depth * groups),
    )


def outer_factor(B: Tensor) -> Tensor:
    """`B [N, r]` of low-rank compensation as operands: bfloat16 `[ceil(N / 64), steps, 128, 4]`.

    Thread `32 w + 4 g + t` has ranks `2 t` and `2 t + 1` of rows `16 w + g` and 8 below, of every
    8 ranks. Exact, for factors in E4M3 and bfloat16.
    """
    missing = (0, -B.shape[1] % RANKS, 0, -B.shape[0] % ROWS)
    full = torch.nn.functional.pad(B.to(torch.bfloat16), missing)
    split = full.view(full.shape[0] // ROWS, 4, 2, 8, full.shape[1] // RANKS, 4, 2)
    ordered = split.permute(0, 4, 1, 3, 5, 2, 6)  # tile, step, warp, row, thread, row / 8, rank
    return ordered.reshape(ordered.shape[0], ordered.shape[1], 128, 4).contiguous()


def inner_factor(A: Tensor) -> Tensor:
    """`A [r, K]` filled up with zeros to whole steps of 8 ranks and 128 columns, in bfloat16."""
    missing = (0, -A.shape[1] % COLUMNS, 0, -A.shape[0] % RANKS)
    return torch.nn.functional.pad(A.to(torch.bfloat16), missing).contiguous()


def by_row(values: Tensor) -> Tensor:
    """Float32 `[N]` filled up to a multiple of 64."""
    missing = (0, -values.shape[0] % ROWS)
    return torch.nn.functional.pad(values.float(), missing).contiguous()
