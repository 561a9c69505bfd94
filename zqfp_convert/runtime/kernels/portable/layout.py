"""How packed weights lie for the portable kernels; plain torch, and nothing of Triton.

In each block of 128 columns byte j (0 to 63) holds column j in its low nibble and column 64 + j in
its high one, so that a tile of bytes becomes two tiles of FP8 numbers without moving any element.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zqfp_convert.numerics import bits, codebook, nibbles
from zqfp_convert.numerics.codebook import Codebook
from zqfp_convert.numerics.scales import power_of_two

BLOCK = 128  # columns
HALF = BLOCK // 2
RUN = 32  # columns of a block that always share a group
SECOND = 0x80  # beside a shift: the group has the second codebook
MOST_RANKS = 32  # of low-rank factors whose tiles fit in registers beside a product's


def supports(group_size: int, columns: int) -> bool:
    """Whether the kernels take groups of that size in rows of `columns` (K) weights.

    They look at a block as four runs of 32 columns with one shift each: groups must begin and end
    between runs, or be the whole row, whose one shift is 0 wherever the row ends.
    """
    return group_size >= columns or group_size % RUN == 0


def padded(columns: int) -> int:
    """K', which is K rounded up to whole blocks."""
    return columns + -columns % BLOCK


def step(group_size: int, columns: int) -> int:
    """Columns from one shift to the next, a multiple of 32: the group, or all of K'."""
    return padded(columns) if group_size >= columns else group_size


def arrange(
    packed: Tensor,
    exponents: Tensor,
    group_size: int,
    columns: int,
    choice: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lay a layer's weights and scales out for the kernels.

    Args:
        packed: uint8 `[N, ceil(K / 2)]`, even columns in the low nibbles.
        exponents: uint8 `[N, G]`, the E8M0 bytes; span at most 11.
        group_size: columns that share an exponent; see `supports`.
        columns: K.
        choice: as in `PackedLayer`.

    Returns:
        weights: uint8 `[N, K' / 2]`, zeros for the columns beyond K.
        shifts: uint8 `[N, G']`, `b_max - b` of each group (0 to 11), and `SECOND` where it has the
            second codebook; zeros beyond G; `G' = ceil(K' / group_size)`, or 1 for groups of a
            whole row.
    """
    assert supports(group_size, columns), f"groups of {group_size} in rows of {columns}"
    rows, width = packed.shape[0], padded(columns)
    codes = nibbles.unpack(packed, columns)
    codes = torch.nn.functional.pad(codes, (0, width - columns))
    halves = codes.view(rows, -1, 2, HALF)  # [N, blocks, half, HALF]
    weights = (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(rows, width // 2)
    shifts = exponents.amax(1, keepdim=True) - exponents  # [N, G]
    if choice is not None:
        shifts |= SECOND * bits.unpack(choice, rows).to(torch.uint8)
    groups = -(-width // step(group_size, columns))
    shifts = torch.nn.functional.pad(shifts, (0, groups - shifts.shape[1]))
    return weights.contiguous(), shifts.contiguous()


def restore(
    weights: Tensor, shifts: Tensor, group_size: int, columns: int
) -> tuple[Tensor, Tensor]:
    """The inverse of `arrange`.

    Returns:
        packed: uint8 `[N, ceil(K / 2)]`, even columns in the low nibbles.
        shifts: uint8 `[N, G]`; the exponents are the row's largest minus these.
    """
    groups = -(-columns // group_size)
    below = shifts[:, :groups] & ~SECOND & 0xFF
    return nibbles.pack(codes_of(weights)[:, :columns]), below.contiguous()


def codes_of(weights: Tensor) -> Tensor:
    """Arranged weights uint8 `[N, K' / 2]` to codes uint8 `[N, K']` in the order of columns."""
    halves = weights.view(weights.shape[0], -1, HALF)  # [N, blocks, HALF]
    return torch.stack((halves & 0x0F, halves >> 4), 2).flatten(1)


def shifts_of(shifts: Tensor, group_size: int, width: int) -> Tensor:
    """Shifts uint8 `[N, G']` to those of the K' = `width` columns, uint8 `[N, K']`."""
    if shifts.shape[1] == 1:
        return shifts.expand(-1, width)
    return shifts.repeat_interleave(group_size, 1)[:, :width]


def matrix_of(
    weights: Tensor, shifts: Tensor, group_size: int, books: tuple[Codebook, ...], top: int
) -> Tensor:
    """The weights `[N, K']` times `2^top`, without their rows' factors, float32."""
    codes = codes_of(weights)
    marked = shifts_of(shifts, group_size, codes.shape[1]).int()
    values = codebook.decode(codes, books[0])
    if len(books) > 1:
        values = torch.where(marked >= SECOND, codebook.decode(codes, books[1]), values)
    return values * power_of_two(top - marked % SECOND)
