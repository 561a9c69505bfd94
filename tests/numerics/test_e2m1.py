"""E2M1: every code, every tie, both zeros, against a search through all values in fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zqfp_convert.numerics import codebook, e2m1

VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)  # of codes 0 to 15
TIES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}  # to even
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CODES = torch.arange(16, dtype=torch.uint8)


def encode(values: torch.Tensor) -> torch.Tensor:
    return codebook.encode(values, codebook.E2M1)


def decode(codes: torch.Tensor) -> torch.Tensor:
    return codebook.decode(codes, codebook.E2M1)


def searched_code(value: float) -> int:
    """The nearest of the 8 magnitudes by trying all; on a tie the one with an even mantissa."""
    wanted = abs(Fraction(value))
    code = min(range(8), key=lambda code: (abs(Fraction(VALUES[code]) - wanted), code % 2))
    return code | 8 if code and value < 0 else code


def every_half(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def test_every_code_has_its_value() -> None:
    decoded = decode(CODES)
    assert decoded.dtype == torch.float32
    assert decoded.tolist() == list(VALUES)
    assert decoded.signbit().tolist() == [False] * 8 + [True] * 8  # code 8 is -0
    assert VALUES[:8] == e2m1.MAGNITUDES
    assert max(VALUES) == e2m1.MAX


def test_decode_keeps_the_shape() -> None:
    assert decode(CODES.view(2, 4, 2)).tolist() == torch.tensor(VALUES).view(2, 4, 2).tolist()


def test_codes_survive_decoding_and_encoding() -> None:
    again = encode(decode(CODES))
    assert again.dtype == torch.uint8
    assert again.tolist() == [*range(8), 0, *range(9, 16)]


def test_values_of_the_grid_stay() -> None:
    values = decode(CODES)
    assert e2m1.round_to_grid(values).tolist() == values.tolist()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("tie", "even"), TIES.items())
def test_ties_go_to_the_even_mantissa(tie: float, even: float, sign: float) -> None:
    middle = torch.tensor([sign * tie])
    assert e2m1.round_to_grid(middle).item() == sign * even
    for towards in (0.0, sign * math.inf):  # the next float32 on either side is no tie
        beside = torch.nextafter(middle, torch.tensor([towards]))
        lower = max(value for value in VALUES[:8] if value < tie)
        upper = min(value for value in VALUES[:8] if value > tie)
        assert e2m1.round_to_grid(beside).item() == sign * (upper if towards else lower)


def test_saturates_at_6() -> None:
    large = torch.tensor([6.0, 6.0000005, 6.999, 7.0, 8.0, 1e30, 3.4e38, math.inf])
    assert e2m1.round_to_grid(large).tolist() == [6.0] * len(large)
    assert e2m1.round_to_grid(-large).tolist() == [-6.0] * len(large)
    assert encode(large).tolist() == [7] * len(large)
    assert encode(-large).tolist() == [15] * len(large)


def test_nan_stays_nan() -> None:
    rounded = e2m1.round_to_grid(torch.tensor([math.nan, 1.1, -math.nan]))
    assert rounded.isnan().tolist() == [True, False, True]
    assert rounded[1] == 1.0


def test_zeros_keep_their_sign_on_the_grid_and_lose_it_in_the_code() -> None:
    zeros = torch.tensor([0.0, 0.25, 1e-45, -0.0, -0.25, -0.1, -1e-45])
    rounded = e2m1.round_to_grid(zeros)
    assert rounded.tolist() == [0.0] * 7
    assert rounded.signbit().tolist() == [False] * 3 + [True] * 4
    assert encode(zeros).tolist() == [0] * 7


@settings(max_examples=300, deadline=None)
@given(st.floats(-8, 8, width=32) | st.floats(width=32, allow_nan=False, allow_infinity=False))
@example(-0.25)
@example(0.25000003)
@example(-1e-45)
def test_any_float32_goes_to_the_nearest(value: float) -> None:
    values = torch.tensor([value])
    code = searched_code(value)
    assert encode(values).tolist() == [code]
    assert e2m1.round_to_grid(values).tolist() == [VALUES[code]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_goes_to_the_nearest(dtype: torch.dtype) -> None:
    halves = every_half(dtype)
    halves = halves[halves.isfinite()]
    middle = torch.tensor(sorted(TIES), dtype=torch.float64)
    magnitude = halves.double().abs()
    above, from_tie = (
        torch.bucketize(magnitude, middle),
        torch.bucketize(magnitude, middle, right=True),
    )
    code = torch.where(above % 2 == 0, above, from_tie)  # the same but on a tie
    code = torch.where((halves < 0) & (code > 0), code + 8, code)
    assert torch.equal(encode(halves), code.to(torch.uint8))
    assert not (encode(halves) == 8).any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_keeps_dtype_and_shape(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.3, -1.3], [4.9, 70.0], [-2.6, 0.0]], dtype=dtype)
    for given_values, wanted in (
        (values, [[0.5, -1.5], [4.0, 6.0], [-3.0, 0.0]]),
        (values.t(), [[0.5, 4.0, -3.0], [-1.5, 6.0, 0.0]]),
    ):
        rounded = e2m1.round_to_grid(given_values)
        assert rounded.tolist() == wanted
        assert decode(encode(given_values)).tolist() == wanted
        assert rounded.dtype == dtype


def test_float64_is_rounded_once() -> None:
    just_above = torch.tensor([0.25, 1.25, 2.5], dtype=torch.float64) * (1 + 2.0**-40)
    assert e2m1.round_to_grid(just_above).tolist() == [0.5, 1.5, 3.0]
    assert encode(just_above).tolist() == [1, 3, 5]
