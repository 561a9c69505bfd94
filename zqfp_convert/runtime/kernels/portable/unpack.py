"""From 4-bit codes to E4M3 bytes in registers, the shift folded in; exact for all of them.

Code magnitudes 0 to 7 times 2^(6 - shift) are the bytes 0, 0x60, 0x68, 0x6C, 0x70, 0x74, 0x78, 0x7C
less 8 for each shift (0 stays 0): below 2^6 a code is an exponent and a mantissa bit, as in E4M3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zqfp_convert.runtime.kernels.portable.casts import INTERPRETED

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


def fast() -> bool:
    """Whether the kernels may unpack four bytes at a time with NVIDIA's instructions."""
    return not INTERPRETED.value and torch.version.cuda is not None


@triton.jit
def unpack(
    packed: tl.tensor, low_shift: tl.tensor, high_shift: tl.tensor, FAST: tl.constexpr
) -> tl.tuple:
    """Bytes of two codes to the E4M3 bytes of the low and of the high ones.

    Args:
        packed: uint8 `[R, 64]`.
        low_shift, high_shift: uint8 `[R, 64]`, 0 to 11, equal within 4 neighbours of a row.
        FAST: see `fast`.
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
        return _place(packed & 0x0F, low_shift), _place(packed >> 4, high_shift)


@triton.jit
def _place(code: tl.tensor, shift: tl.tensor) -> tl.tensor:
    """Codes uint8 (0 to 15) to E4M3 bytes."""
    magnitude = code & 7
    byte = 4 * magnitude + (0x60 - 8 * shift)
    byte = tl.where(magnitude == 1, byte - 4, byte)  # one half has no mantissa bit
    byte = tl.where(magnitude == 0, 0, byte)
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
