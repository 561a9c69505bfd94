"""Activations: the checkpoint's own rule, static ranges, SmoothQuant, outliers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zqfp_convert.compare.activations import (
    ActivationQuantizer,
    Range,
    SimulatedLinear,
    smoothing,
)
from zqfp_convert.compare.formats import FORMATS
from zqfp_convert.numerics import fp8


def dynamic(name: str) -> ActivationQuantizer:
    return ActivationQuantizer.make(FORMATS[name], None, None)


def with_outliers(tokens: int = 64, width: int = 96, factor: float = 60.0) -> Tensor:
    inputs = torch.randn(4, tokens, width)
    inputs[..., [3, 50]] *= factor
    return inputs


def test_e4m3_for_each_token_is_the_checkpoints_rule() -> None:
    inputs = with_outliers()
    inputs[0, 0] = 0.0
    assert torch.equal(dynamic("e4m3")(inputs), fp8.simulate(inputs))
    assert torch.equal(dynamic("e4m3")(inputs.bfloat16()), fp8.simulate(inputs.bfloat16()))


def test_nothing_is_done_without_a_format() -> None:
    inputs = with_outliers()
    assert torch.equal(ActivationQuantizer.make(None, None, None)(inputs), inputs)


@pytest.mark.parametrize("name", ["int8", "int8-asym", "e4m3", "e5m2", "e3m4"])
def test_a_static_grid_is_that_of_the_whole_range(name: str) -> None:
    inputs = with_outliers() + 0.5
    static = ActivationQuantizer.make(FORMATS[name], None, Range.of(inputs))
    low, high = inputs.min(), inputs.max()
    end = low if -low > high else high
    assert float((static(inputs) - inputs).abs().max()) <= float(inputs.abs().max()) / 8
    assert static(inputs * 100).abs().max() <= 1.01 * end.abs()  # clipped
    if name == "int8":
        step = end.abs() / 127
        assert torch.equal(static(inputs), (inputs / step).round().clamp(-127, 127) * step)
    if name == "int8-asym":
        step = (high - low) / 255
        assert float((static(inputs) - inputs).abs().max()) <= 1.01 * float(step)


def test_ranges_are_joined_by_channel() -> None:
    inputs = with_outliers()
    whole = Range.of(inputs)
    joined = Range.of(inputs[:1]).joined(Range.of(inputs[1:]))
    assert torch.equal(joined.low, whole.low)
    assert torch.equal(joined.high, whole.high)
    assert torch.equal(whole.high, inputs.flatten(0, 1).amax(0))


def test_smoothing_keeps_the_function_and_evens_out_channels() -> None:
    inputs, linear = with_outliers(), nn.Linear(96, 40).requires_grad_(False)
    linear.weight.data[:, 7] = 0.0
    seen = Range.of(inputs)
    divisor = smoothing(seen, [linear.weight.data, 0.1 * linear.weight.data], 0.5)
    peak = inputs.flatten(0, 1).abs().amax(0)
    want = (peak / linear.weight.data.abs().amax(0)).sqrt()
    want[7] = 1.0
    torch.testing.assert_close(divisor, want)
    only_divides = ActivationQuantizer.make(None, divisor, None)
    smoothed = SimulatedLinear(linear.weight.data * divisor, linear.bias.data, only_divides)
    torch.testing.assert_close(smoothed(inputs), linear(inputs), rtol=1e-4, atol=1e-4)

    def error(by: Tensor | None) -> float:
        quantizer = ActivationQuantizer.make(FORMATS["int8"], by, seen)
        weight = linear.weight.data if by is None else linear.weight.data * by
        made = SimulatedLinear(weight, linear.bias.data, quantizer)(inputs)
        return float((made - linear(inputs)).norm())

    assert error(divisor) < 0.5 * error(None)


def test_integers_suffer_from_outliers_and_floats_do_not() -> None:
    def error(name: str, factor: float) -> float:
        inputs = with_outliers(factor=factor)
        usual = [channel for channel in range(96) if channel not in (3, 50)]
        return float((dynamic(name)(inputs) - inputs)[..., usual].norm())

    assert error("int8", 1.0) < error("e4m3", 1.0)
    assert error("int8", 300.0) > 5 * error("e4m3", 300.0)
    assert error("e4m3", 300.0) < 2 * error("e4m3", 1.0)
