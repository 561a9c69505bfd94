"""Fake quantization against all values that a group's scale admits, and the rules of scales."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_formats import MAGNITUDES
from torch import Tensor

from zqfp_convert.compare.formats import FORMATS
from zqfp_convert.compare.placement import place
from zqfp_convert.numerics import scales

COLUMNS, GROUP = 80, 24  # the last group is shorter


def matrix(rows: int = 6, columns: int = COLUMNS) -> Tensor:
    found = torch.randn(rows, columns)
    found[0] *= 1e-6
    found[1] = found[1].abs() + 3.0  # one-sided, away from zero
    found[2, 5] = 40.0
    found[3] = 0.0
    return found


def all_values(name: str) -> np.ndarray:
    if name.endswith("-asym"):
        return np.arange(FORMATS[name].largest + 1)
    return np.concatenate([-MAGNITUDES[name], MAGNITUDES[name]])


@pytest.mark.parametrize("name", FORMATS)
def test_no_other_value_of_the_grid_is_nearer(name: str) -> None:
    weight = matrix()
    placed = place(weight, FORMATS[name], GROUP)
    found = placed.quantize(weight).double().numpy()
    size = placed.group
    assert size == {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}.get(name, GROUP)
    assert placed.scale.shape == (6, math.ceil(COLUMNS / size))
    for row in range(6):
        for column in range(COLUMNS):
            at = row, column // size
            offset = 0.0 if placed.offset is None else float(placed.offset[at])
            grid = all_values(name) * float(placed.scale[at]) + offset
            wanted = float(weight[row, column])
            best = np.abs(grid - wanted).min()
            got = found[row, column]
            tiny = 1e-6 * max(np.abs(grid).max(), abs(wanted))  # float32 sums of offset and value
            assert abs(got - wanted) <= best + tiny
            assert np.abs(grid - got).min() <= tiny


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.block is None])
def test_free_scales_reach_from_end_to_end(name: str) -> None:
    weight, form = matrix(), FORMATS[name]
    placed = place(weight, form, COLUMNS)
    left = placed.quantize(weight)
    top = weight.abs().amax(1)
    if form.asymmetric:
        width = weight.amax(1).clamp_min(0) - weight.amin(1).clamp_max(0)
        torch.testing.assert_close(placed.scale[:, 0] * form.largest, width.clamp_min(2.0**-100))
        assert bool(((left - weight).abs().amax(1) <= placed.scale[:, 0] * 1.01).all())
        zero = placed.offset / placed.scale  # a whole number of steps, so that 0 is a value
        torch.testing.assert_close(zero, zero.round())
    else:
        torch.testing.assert_close(placed.scale[:, 0] * form.largest, top.clamp_min(2.0**-100))
        torch.testing.assert_close(left.abs().amax(1), top)
    assert not bool(left[3].any())


def test_mx_scales_are_the_specifications() -> None:
    weight = torch.zeros(1, 96)
    weight[0, 0], weight[0, 32], weight[0, 64] = 7.9, -8.0, 2.0**-130
    fp4 = place(weight, FORMATS["mxfp4"], 128)
    # floor(log2 7.9) = 2 and E2M1's largest exponent is 2; 7.9 saturates at 6
    assert fp4.scale[0, :2].tolist() == [1.0, 2.0]
    assert fp4.quantize(weight)[0, [0, 32]].tolist() == [6.0, -8.0]
    fp8 = place(weight, FORMATS["mxfp8"], 128)
    assert fp8.scale[0, :2].tolist() == [2.0**-6, 2.0**-5]  # E4M3's is 8
    assert bool((fp8.scale > 0).all())


def test_nvfp4_scales_are_e4m3_under_one_for_the_tensor() -> None:
    weight = torch.randn(4, 64) * torch.tensor([1.0, 1e-1, 1e-4, 0.0])[:, None]
    placed = place(weight, FORMATS["nvfp4"], 128)
    whole = weight.abs().max() / (6 * 448)
    stored = placed.scale / whole
    torch.testing.assert_close(stored, stored.to(torch.float8_e4m3fn).float(), rtol=1e-6, atol=0)
    assert float(stored.max()) == pytest.approx(448.0)
    assert bool((placed.scale > 0).all())
    assert placed.bits == 8 * 16 + 32


@pytest.mark.parametrize("kind", ["m1", "m2"])
@pytest.mark.parametrize("rounding", ["ceil", "floor", "nearest"])
def test_constrained_scales_are_the_checkpoints(kind: scales.Kind, rounding: str) -> None:
    weight = torch.randn(8, 256)
    placed = place(weight, FORMATS["e2m1"], 64, kind, rounding)
    chosen = scales.choose(weight, kind, rounding, 64)
    assert torch.equal(placed.scale, chosen.per_group())
    want = scales.dequantize(scales.quantize(weight, chosen), chosen)
    assert torch.equal(placed.quantize(weight), want)
    e3m0 = place(weight, FORMATS["e3m0"], 64, kind, rounding).scale
    if kind == "m1":
        assert torch.equal(e3m0.log2(), e3m0.log2().round())
        if rounding == "ceil":  # S <= scale < 2 S, S = absmax / 16
            ideal = weight.view(8, 4, 64).abs().amax(-1) / 16
            assert bool(((e3m0 >= ideal) & (e3m0 < 2 * ideal)).all())


def test_bits_of_scales() -> None:
    weight = torch.randn(8, 256)
    for name, kind, bits in (
        ("e2m1", "free", 16 * 8 * 4),
        ("e2m1", "m1", 8 * 8 * 4),
        ("e2m1", "m2", 8 * 8 * 4 + 16 * 8),
        ("int4-asym", "free", (16 + 4) * 8 * 4),
        ("mxfp4", "free", 8 * 8 * 8),
    ):
        assert place(weight, FORMATS[name], 64, kind).bits == bits
