"""The numbers of zqfp-1, by literal tables and exact fractions.

For the maker of the test vectors alone: slow, and written apart from the reader, so that each
checks the other.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BF16_ONE, BF16_INFINITY, BF16_NAN = 0x3F80, 0x7F80, 0x7FC0


def float32(value: float) -> bytes:
    """Encode as float32."""
    return struct.pack("<f", value)


def bf16_value(bits: int) -> float:
    """Decode BF16."""
    (value,) = struct.unpack("<f", struct.pack("<HH", 0, bits))
    return float(value)


def code_value(code: int, magnitudes: Sequence[float] = MAGNITUDES) -> float:
    """Decode E2M1, or the codebook that has these magnitudes."""
    return -float(magnitudes[code - 8]) if code >= 8 else float(magnitudes[code])


def e4m3_magnitudes() -> Iterator[Fraction]:
    """The 127 values of the bytes 0x00 to 0x7E."""
    for byte in range(127):
        exponent, mantissa = divmod(byte, 8)
        if exponent == 0:
            yield Fraction(mantissa, 512)
        else:
            yield Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7)


E4M3 = tuple(e4m3_magnitudes())


def e4m3_value(byte: int) -> float:
    """Decode E4M3 but for NaN."""
    magnitude = float(E4M3[byte % 128])
    return -magnitude if byte >= 128 else magnitude


def nearest_float32(value: Fraction) -> Fraction:
    """Round half to even; for magnitudes below the largest float32."""
    if value == 0:
        return value
    exponent = -126
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** (exponent - 23)
    return round(value / step) * step


def nearest_e4m3(value: Fraction) -> int:
    """The byte of a value that is not negative; ties to the even byte, saturating."""
    return min(range(127), key=lambda byte: (abs(E4M3[byte] - value), byte % 2))


def pseudo_random(seed: str, count: int) -> bytes:
    """Return the same `count` bytes for the same seed, on every machine."""
    blocks = (hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(count // 32 + 1))
    return b"".join(blocks)[:count]
