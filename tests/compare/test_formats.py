"""Every format against an independent list of all its values, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zqfp_convert.compare.formats import ACTIVATIONS, FORMATS, NONE, WEIGHTS
from zqfp_convert.numerics import e2m1, fp8


def floats(exponent: int, mantissa: int, bias: int, dropped: int = 0) -> np.ndarray:
    """Magnitudes of all codes in order, decoded one by one; the last `dropped` mean NaN or inf."""
    found = []
    for code in range(2 ** (exponent + mantissa) - dropped):
        e, m = divmod(code, 2**mantissa)
        fraction = m / 2**mantissa
        found.append(2.0 ** (1 - bias) * fraction if e == 0 else 2.0 ** (e - bias) * (1 + fraction))
    return np.array(found)


MAGNITUDES = {
    "int8": np.arange(128.0),
    "int4": np.arange(8.0),
    "e4m3": floats(4, 3, 7, dropped=1),
    "e5m2": floats(5, 2, 15, dropped=4),
    "e3m4": floats(3, 4, 3, dropped=1),
    "e2m1": floats(2, 1, 1),
    "e3m0": floats(3, 0, 3),
    "mxfp8": floats(4, 3, 7, dropped=1),
    "mxfp4": floats(2, 1, 1),
    "nvfp4": floats(2, 1, 1),
}


def nearest(values: np.ndarray, magnitudes: np.ndarray, ties_to_even: bool) -> np.ndarray:
    """By distance to every magnitude; of two as near, the even code, or else the larger one."""
    distance = np.abs(np.abs(values)[:, None] - magnitudes[None])
    best = distance.min(1, keepdims=True)
    codes = np.arange(len(magnitudes))
    preferred = codes % 2 if ties_to_even else -codes
    order = np.where(distance == best, preferred[None], np.inf)
    return np.sign(values) * magnitudes[order.argmin(1)]


def telling(magnitudes: np.ndarray) -> np.ndarray:
    """Values, the middles between them, what lies next to these, beyond the end, and others."""
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    points = np.concatenate([magnitudes, middles, magnitudes[-1] * np.array([1.01, 2.0, 1e6])])
    points = points.astype(np.float32)
    near = [points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(1e9))]
    spread = np.random.default_rng(0).lognormal(0, 3, 4000).astype(np.float32)
    all_of_them = np.concatenate([*near, spread])
    return np.concatenate([all_of_them, -all_of_them])


@pytest.mark.parametrize("name", MAGNITUDES)
def test_rounding_is_to_the_nearest_of_all_values(name: str) -> None:
    magnitudes, points = MAGNITUDES[name], telling(MAGNITUDES[name])
    found = FORMATS[name].round(torch.from_numpy(points)).double().numpy()
    even = nearest(points.astype(np.float64), magnitudes, ties_to_even=True)
    if name == "e3m0":  # no mantissa to be even: to the larger, but half the smallest becomes 0
        even = nearest(points.astype(np.float64), magnitudes, ties_to_even=False)
        even[np.abs(points) == 0.125] = 0.0
    np.testing.assert_array_equal(found, even)


@pytest.mark.parametrize(("name", "largest"), [("int8-asym", 255), ("int4-asym", 15)])
def test_asymmetric_integers(name: str, largest: int) -> None:
    points = torch.linspace(-5.0, largest + 5.0, 4001)
    want = points.double().round().clamp(0, largest)
    assert torch.equal(FORMATS[name].round(points).double(), want)


def test_where_the_package_or_torch_has_the_format_the_bytes_are_the_same() -> None:
    points = torch.from_numpy(telling(MAGNITUDES["e5m2"]))
    assert torch.equal(FORMATS["e2m1"].round(points), e2m1.round_to_grid(points))
    assert torch.equal(FORMATS["e4m3"].round(points), fp8.decode(fp8.encode(points)))
    inside = points[points.abs() <= 57344]
    assert torch.equal(FORMATS["e5m2"].round(inside), inside.to(torch.float8_e5m2).float())


@pytest.mark.parametrize("name", FORMATS)
def test_ends_zero_and_nan(name: str) -> None:
    form = FORMATS[name]
    found = form.round(torch.tensor([1e30, -1e30, 0.0, float("nan")]))
    assert found[:3].tolist() == [form.largest, form.smallest, 0.0]
    assert found[3].isnan()


def test_what_can_be_chosen() -> None:
    assert set(MAGNITUDES) | {"int8-asym", "int4-asym", NONE} == set(WEIGHTS)
    assert set(ACTIVATIONS) <= set(WEIGHTS)
    assert all(FORMATS[name].bits == 8 for name in ACTIVATIONS if name != NONE)
