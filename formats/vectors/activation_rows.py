"""Rows of activations with the scale and the E4M3 bytes that zqfp-1 gives them.

For the maker of the test vectors: finite rows by exact fractions, rows with NaN or infinity by the
letter of the rule. Knows nothing of the reader.
"""

from __future__ import annotations

import math
import struct
from fractions import Fraction

from numbers_by_table import float32, nearest_e4m3, nearest_float32, pseudo_random

NAN_BYTE = 0x7F


def widest(name: str, count: int, low: int, high: int) -> list[float]:
    """Pseudo-random float32 values of either sign with exponents from `low` to below `high`."""
    noise = pseudo_random(name, 4 * count)
    values = []
    for i in range(count):
        sign, a, b, exponent = noise[4 * i : 4 * i + 4]
        magnitude = math.ldexp(1 + (a << 8 | b) / 65536, low + exponent % (high - low))
        values.append(-magnitude if sign % 2 else magnitude)
    return values


# With 448 in a row its scale is 1, and each x is itself what is rounded to E4M3.
ROWS: dict[str, list[float]] = {
    "zeros": [0.0, 0.0, 0.0, 0.0],
    "negative-zeros": [-0.0, 0.0, -0.0, 1.0],
    "all-negative-zeros": [-0.0, -0.0],
    "one-value": [-3.0],
    "absmax-at-the-floor": [2.0**-100, -(2.0**-101), 2.0**-109],
    "absmax-below-the-floor": [2.0**-101, -(2.0**-104), 3 * 2.0**-112, -(2.0**-149)],
    "float32-subnormals": [2.0**-149, -(2.0**-130), 2.0**-127],
    "largest-float32": [3.4028234663852886e38, -1.0e38, 2.0**-149, -0.0],
    "ties-normal": [448.0, 17.0, 19.0, -17.0, -19.0, 34.0, 38.0, 432.0, 400.0, 1.0625, 1.1875],
    "beside-ties": [448.0, 17.0 + 2.0**-19, 17.0 - 2.0**-20, -(19.0 - 2.0**-19), 19.0 + 2.0**-19],
    "ties-subnormal": [448.0, *(i * 2.0**-10 for i in range(-3, 18))],
    "below-half-the-smallest": [448.0, 2.0**-10, -(2.0**-10), 2.0**-10 + 2.0**-33, -(2.0**-11)],
    "carry-to-the-next-exponent": [448.0, 31.5, 30.99, -31.0, 15.75, 2.0**-6 - 2.0**-12],
    # 1.9999999 / (1.9999999 / 448) rounds above 448 in float32.
    "saturation-edge": [1.9999998807907104, 1.0, -1.9999998807907104, 1.9999997615814209],
    "quotient-above-448": [1.0000001192092896, -1.0000001192092896, 0.33333334],
    "six-decades": [s * 10.0**-e for e in range(7) for s in (1.0, -2.5, 7.3)],
    "random-narrow": widest("narrow", 48, -4, 4),
    "random-wide": widest("wide", 48, -40, 40),
    "nan": [1.0, math.nan, -2.0, 0.0],
    "infinity": [1.0, math.inf, -2.0, 0.0, -0.0, -math.inf],
    "nan-and-infinity": [math.inf, math.nan, 1.0],
}


def quantize(row: list[float]) -> tuple[float, bytes]:
    """Return scale and E4M3 bytes of one token."""
    if any(math.isnan(x) for x in row):
        return math.nan, bytes([NAN_BYTE] * len(row))
    signs = [0x80 if math.copysign(1.0, x) < 0 else 0 for x in row]
    if any(math.isinf(x) for x in row):
        codes = [NAN_BYTE if math.isinf(x) else s for x, s in zip(row, signs, strict=True)]
        return math.inf, bytes(codes)
    magnitudes = [abs(Fraction(x)) for x in row]
    scale = nearest_float32(max(*magnitudes, Fraction(2) ** -100) / 448)
    quotients = [nearest_float32(magnitude / scale) for magnitude in magnitudes]
    codes = [s | nearest_e4m3(q) for s, q in zip(signs, quotients, strict=True)]
    return float(scale), bytes(codes)


def activation_rows() -> list[dict[str, str]]:
    """Little-endian float32 hex of x and scale, and the bytes; a NaN is 7fc00000."""
    rows = []
    for name, values in ROWS.items():
        data = b"".join(map(float32, values))
        scale, codes = quantize(list(struct.unpack(f"<{len(values)}f", data)))
        entry = {"x": data.hex(), "scale": float32(scale).hex(), "codes": codes.hex()}
        rows.append({"name": name} | entry)
    return rows
