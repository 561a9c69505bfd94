"""From 4-bit codes to E4M3 bytes in registers, the shift folded in; exact for all of them.

Code magnitudes 0 to 7 times 2^(6 - shift) are, of E2M1, the bytes 0, 0x60, 0x68, 0x6C, 0x70, 0x74,
0x78, 0x7C less 8 for each shift (0 stays 0): a step of the exponent. So it is with every codebook.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from zqfp_convert.numerics import fp8
from zqfp_convert.numerics.codebook import E2M1, Codebook
from zqfp_convert.numerics.kernels.casts import INTERPRETED

# Four packed bytes ($2) to four low ($0) and four high ($1) E4M3 bytes. The eight magnitudes for
# a shift fill two registers from which `prmt` picks four bytes by four neighbouring nibbles; these
# alternate low, high, so a last `prmt` sorts them. $3 and $4 hold a shift in each of four bytes,
# of the low and of the high columns, and all four have to be equal. No byte ever borrows from the
# next, for a shift is 11 at most and 8 * 11 < 0x60. Where $3 is $4 the assembler merges the tables.
_PTX = tl.constexpr("""
{
.reg .b32 step, small_low, large_low, small_high, large_high;
.reg .b32 code, next, first, second, low, high;
and.b32 code, $2, 0x77777777;
shr.u32 next, code, 16;
shl.b32 step, $3, 3;
sub.u32 large_low, 0x7C787470, step;
and.b32 step, step, 0xFFFFFF00;
sub.u32 small_low, 0x6C686000, step;
shl.b32 step, $4, 3;
sub.u32 large_high, 0x7C787470, step;
and.b32 step, step, 0xFFFFFF00;
sub.u32 small_high, 0x6C686000, step;
prmt.b32 first, small_low, large_low, code;
prmt.b32 second, small_low, large_low, next;
prmt.b32 first, first, second, 0x6420;
shl.b32 step, $2, 4;
and.b32 step, step, 0x80808080;
or.b32 low, first, step;
prmt.b32 first, small_high, large_high, code;
prmt.b32 second, small_high, large_high, next;
prmt.b32 first, first, second, 0x7531;
and.b32 step, $2, 0x80808080;
or.b32 high, first, step;
mov.b32 $0, low;
mov.b32 $1, high;
}
""")


def fast(books: tuple[Codebook, ...]) -> bool:
    """Whether the kernels may unpack four bytes at a time with NVIDIA's instructions."""
    return not INTERPRETED.value and torch.version.cuda is not None and books == (E2M1,)


@cache
def table(books: tuple[Codebook, ...]) -> tuple[int, int]:
    """The E4M3 bytes of each codebook's magnitudes times 2^6, the first of them lowest."""
    bytes_of = [
        fp8.encode(torch.tensor(book) * 2.0**6).view(torch.uint8).tolist() for book in books
    ]
    words = [sum(byte << 8 * code for code, byte in enumerate(row)) for row in bytes_of]
    return words[0], words[-1]


@triton.jit
def unpack(
    packed: tl.tensor,
    low_shift: tl.tensor,
    high_shift: tl.tensor,
    FAST: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
) -> tl.tuple:
    """Bytes of two codes to the E4M3 bytes of the low and of the high ones.

    Args:
        packed: uint8 `[R, 64]`.
        low_shift, high_shift: uint8 `[R, 64]`, 0 to 11, equal within 4 neighbours of a row; 128
            more where the second codebook holds.
        FAST: see `fast`.
        FIRST, SECOND: see `table`.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            _PTX,
            "=r,=r,r,r,r",
            [packed, low_shift, high_shift],
            dtype=(tl.uint8, tl.uint8),
            is_pure=True,
            pack=4,
        )
    else:
        low = _place(packed & 0x0F, low_shift, FIRST, SECOND)
        return low, _place(packed >> 4, high_shift, FIRST, SECOND)


@triton.jit
def _place(
    code: tl.tensor, shift: tl.tensor, FIRST: tl.constexpr, SECOND: tl.constexpr
) -> tl.tensor:
    """Codes uint8 (0 to 15) to E4M3 bytes."""
    magnitude = code & 7
    place = magnitude.to(tl.int64) * 8
    byte = ((tl.full(code.shape, FIRST, tl.int64) >> place) & 0xFF).to(tl.uint8)
    if FIRST != SECOND:
        other = ((tl.full(code.shape, SECOND, tl.int64) >> place) & 0xFF).to(tl.uint8)
        byte = tl.where(shift > 127, other, byte)
    byte = tl.where(magnitude == 0, 0, byte - 8 * (shift & 15))
    return byte | ((code & 8) << 4)


@triton.jit
def block_shifts(shifts: tl.tensor, block: tl.tensor, GROUP: tl.constexpr) -> tl.tuple:
    """The shifts of a block of 128 columns for its low and its high nibbles.

    Args:
        shifts: pointers to the first shift of each row `[R]`.
        block: index of the block.
        GROUP: columns from one shift to the next, a multiple of 32.

    Returns:
        uint8 `[R, 64]` twice.
    """
    low = tl.load(shifts + block * 128 // GROUP)[:, None]
    if GROUP % 128 == 0:
        low = tl.broadcast_to(low, (low.shape[0], 64))
        return low, low
    else:
        high = tl.load(shifts + (block * 128 + 64) // GROUP)[:, None]
        if GROUP % 64 == 0:
            low = tl.broadcast_to(low, (low.shape[0], 64))
            return low, tl.broadcast_to(high, (high.shape[0], 64))
        else:
            first = (tl.arange(0, 64) < 32)[None, :]
            low_end = tl.load(shifts + (block * 128 + 32) // GROUP)[:, None]
            high_end = tl.load(shifts + (block * 128 + 96) // GROUP)[:, None]
            return tl.where(first, low, low_end), tl.where(first, high, high_end)
