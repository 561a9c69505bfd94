"""E4M3: every byte, every tie; the rule for tokens against numpy's float32 division."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zqfp_convert.numerics import fp8

BYTES = torch.arange(256, dtype=torch.int16).to(torch.uint8)


def value_of(byte: int) -> float:
    """OCP's float8_e4m3fn: bias 7, subnormals m * 2^-9, no infinity, NaN where all ones."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if byte & 0x80 else magnitude


POSITIVE = np.array([value_of(byte) for byte in range(0x7F)])  # ascending, 0 to 448
MIDDLE = (POSITIVE[:-1] + POSITIVE[1:]) / 2


def nearest_bytes(values: np.ndarray) -> np.ndarray:
    """The byte of the nearest value, ties to even, saturating; for finite values."""
    magnitude = np.abs(values.astype(np.float64))
    below_tie, above_tie = (
        np.searchsorted(MIDDLE, magnitude),
        np.searchsorted(MIDDLE, magnitude, side="right"),
    )
    code = np.where(below_tie % 2 == 0, below_tie, above_tie)
    return (code | np.signbit(values) * 0x80).astype(np.uint8)


def encoded(values: list[float] | np.ndarray) -> list[int]:
    return fp8.encode(torch.tensor(values)).view(torch.uint8).tolist()


def test_every_byte_has_its_value() -> None:
    decoded = fp8.decode(BYTES.view(torch.float8_e4m3fn))
    assert decoded.dtype == torch.float32
    for byte, value in enumerate(decoded.tolist()):
        if math.isnan(value_of(byte)):
            assert byte in (0x7F, 0xFF)
            assert math.isnan(value)
        else:
            assert (value, math.copysign(1, value)) == (
                value_of(byte),
                math.copysign(1, value_of(byte)),
            )


def test_some_bytes_by_heart() -> None:
    heart = {0x00: 0, 0x01: 2**-9, 0x07: 7 * 2**-9, 0x08: 2**-6, 0x38: 1, 0x7E: 448, 0xC4: -3}
    for byte, value in heart.items():
        assert value_of(byte) == value
        assert encoded([float(value)]) == [byte]


def test_values_of_the_format_stay() -> None:
    numbers = BYTES[(BYTES & 0x7F) != 0x7F]
    assert torch.equal(fp8.encode(fp8.decode(numbers.view(fp8.DTYPE))).view(torch.uint8), numbers)


@pytest.mark.parametrize("sign", [1, -1])
def test_every_tie_goes_to_the_even_mantissa(sign: int) -> None:
    middle = (sign * MIDDLE).astype(np.float32)
    assert (np.abs(middle) == MIDDLE).all()
    lower = np.arange(0x7E) + (0x80 if sign < 0 else 0)
    assert encoded(middle) == (lower + lower % 2).tolist()
    assert encoded(np.nextafter(middle, np.float32(0))) == lower.tolist()
    assert encoded(np.nextafter(middle, np.float32(sign * np.inf))) == (lower + 1).tolist()


def test_saturates_at_448() -> None:
    large = [448.0, 449.0, 464.0, 464.0001, 480.0, 1e30, math.inf]
    assert encoded(large) == [0x7E] * len(large)
    assert encoded([-value for value in large]) == [0xFE] * len(large)


def test_zeros_keep_their_sign() -> None:
    assert encoded([0.0, 1e-45, 2.0**-10]) == [0x00] * 3
    assert encoded([-0.0, -1e-45, -(2.0**-10)]) == [0x80] * 3


def test_nan_stays_nan() -> None:
    assert fp8.decode(fp8.encode(torch.tensor([math.nan, 1.0]))).isnan().tolist() == [True, False]


@settings(max_examples=300, deadline=None)
@given(st.floats(-500, 500, width=32) | st.floats(-0.03125, 0.03125, width=32))
def test_any_float32_goes_to_the_nearest(value: float) -> None:
    wanted = abs(Fraction(value))
    code = min(range(0x7F), key=lambda byte: (abs(Fraction(value_of(byte)) - wanted), byte % 2))
    code |= 0x80 if math.copysign(1, value) < 0 else 0
    assert encoded([value]) == [code]
    assert nearest_bytes(np.array([value])).tolist() == [code]  # what the tests below lean on


def near_ties(tokens: int) -> np.ndarray:
    """Tokens whose quotients by their scales lie on ties between E4M3 values, or beside them."""
    absmax = np.exp(np.random.default_rng(0).uniform(-40, 40, (tokens, 1))).astype(np.float32)
    scale = absmax / np.float32(448)
    middle = MIDDLE.astype(np.float32) * scale
    return np.concatenate([absmax, middle, -middle, np.nextafter(middle, np.float32(0))], axis=1)


def test_tokens_are_divided_as_ieee_has_it() -> None:
    x = near_ties(500)
    scale = np.maximum(np.abs(x).max(1, keepdims=True), np.float32(2.0**-100)) / np.float32(448)
    wanted = nearest_bytes(x / scale)
    codes, have_scale = fp8.quantize(torch.from_numpy(x))
    assert codes.dtype == fp8.DTYPE
    assert have_scale.dtype == torch.float32
    assert (have_scale.numpy() == scale).all()
    assert (codes.view(torch.uint8).numpy() == wanted).all()
    # These values tell a division from a multiplication with a reciprocal.
    assert (nearest_bytes(x * (np.float32(1) / scale)) != wanted).any()
    assert (nearest_bytes(x * (np.float32(448) / x.max(1, keepdims=True))) != wanted).any()


def test_each_token_has_its_scale() -> None:
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    codes, scale = fp8.quantize(x)
    assert codes.shape == x.shape
    assert scale.shape == (3, 5, 1)
    assert torch.equal(scale[..., 0], x.abs().amax(-1) / 448)
    assert fp8.decode(codes).abs().amax(-1).eq(448).all()


def test_other_dimensions() -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    codes, scale = fp8.quantize(x, dim=0)
    turned_codes, turned_scale = fp8.quantize(x.t())
    assert scale.shape == (1, 4)
    assert torch.equal(scale, turned_scale.t())
    assert torch.equal(codes.view(torch.uint8), turned_codes.t().view(torch.uint8))


@pytest.mark.parametrize("absmax", [0.0, 1e-45, 1e-38, 2.0**-100])
def test_the_scale_of_tiny_tokens(absmax: float) -> None:
    x = torch.tensor([[absmax, -absmax / 2, 0.0]])
    codes, scale = fp8.quantize(x)
    assert scale.item() == np.float32(2.0**-100) / np.float32(448) > 2.0**-126
    wanted = nearest_bytes(x.numpy() / scale.numpy())
    assert codes.view(torch.uint8).tolist() == wanted.tolist()


def test_nan_and_infinity_propagate() -> None:
    inf, nan = math.inf, math.nan
    x = torch.tensor([[1.0, inf, -2.0], [-inf, 0.0, 3.0], [nan, 1.0, 2.0], [nan, inf, 0.0]])
    codes, scale = fp8.quantize(x)
    assert scale[:2, 0].tolist() == [inf, inf]
    assert scale[2:].isnan().all()
    assert codes.float().isnan().tolist() == [
        [False, True, False],
        [True, False, False],
        [True, True, True],
        [True, True, True],
    ]
    bits = codes.view(torch.uint8)
    assert [bits[0, 0], bits[0, 2], bits[1, 1], bits[1, 2]] == [0x00, 0x80, 0x00, 0x00]
    assert fp8.simulate(x).isnan().all()


def test_one_bad_token_leaves_the_others() -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    clean = fp8.simulate(x)
    x[1, 3] = math.nan
    assert torch.equal(fp8.simulate(x)[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_simulation_is_the_decoded_value_times_the_scale(dtype: torch.dtype) -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, scale = fp8.quantize(x)
    simulated = fp8.simulate(x)
    values = np.array([value_of(byte) for byte in codes.view(torch.uint8).flatten().tolist()])
    product = values.reshape(7, 33).astype(np.float32) * scale.numpy()
    assert simulated.dtype == dtype
    assert torch.equal(simulated, torch.from_numpy(product).to(dtype))
    # half a step: 2^-4 of a normal number, 2^-10 scales of a subnormal one
    assert ((simulated - x).abs().float() <= x.abs().float() * 2.0**-4 + scale * 2.0**-10).all()
