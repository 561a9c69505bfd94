"""A linear that can be tuned: what it stands for, its gradients, and what it becomes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zqfp_convert.checkpoint.packed import pack
from zqfp_convert.distill import tunable
from zqfp_convert.distill.tunable import EDGE, REACH, TunableLinear
from zqfp_convert.numerics import codebook, fp8
from zqfp_convert.quantize.hessian import Curvature, HessianSum, prepare
from zqfp_convert.quantize.weight import QuantizedWeight, quantize_weight
from zqfp_convert.recipe import Recipe

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
ROWS, COLUMNS = 24, 70
CHOICES: list[dict[str, Any]] = [
    {"scales": "m2"},
    {"scales": "m2", "rank": 3},
    {"scales": "m1", "rank": 3, "factors": "bf16"},
    {"scales": "free", "group_size": 64},
    {"scales": "m2", "group_size": "row"},
    {"scales": "m2", "codebooks": "pair", "rank": 3},
    {"scales": "m1", "codebooks": "pair"},
]


def weight_of() -> Tensor:
    weight = torch.randn(ROWS, COLUMNS) * torch.exp(torch.randn(ROWS, 1)) * 0.02
    weight[1] = 0
    weight[2, 32:64] = 0
    return weight


def curvature() -> Curvature:
    total = HessianSum(COLUMNS, cross=False, device="cpu")
    total.add(torch.randn(400, COLUMNS) @ torch.randn(COLUMNS, COLUMNS))
    hessian, cross = total.mean()
    return prepare(hessian, cross, damping=0.01, activation_order=True)


def solved_by(weight: Tensor, **choices: Any) -> QuantizedWeight:
    choices = {"group_size": 32, "codebooks": "e2m1", "rank": 0, "tune": 1} | choices
    return quantize_weight(weight, curvature(), Recipe.named("best", **choices))


@pytest.mark.parametrize("book", [codebook.E2M1, *codebook.PAIR])
def test_places_are_the_grid_drawn_out(book: codebook.Codebook) -> None:
    values = np.linspace(-8, 8, 3201).astype(np.float32)

    def magnitudes(codes: Tensor) -> Tensor:
        return torch.tensor(book)[codes]

    have = tunable._place(torch.from_numpy(values), magnitudes).numpy()
    size = np.abs(values)
    want = np.interp(size, book, np.arange(8))
    beyond = 7 + (size - book[7]) / (book[7] - book[6])
    want = np.where(size > book[7], beyond, want) * np.sign(values)
    np.testing.assert_allclose(have, want, atol=1e-5)
    inside = torch.from_numpy(values[size <= book[7]])
    place = tunable._place(inside, magnitudes)
    torch.testing.assert_close(tunable._value(place, magnitudes), inside)


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_it_starts_as_what_was_solved(choices: dict[str, Any]) -> None:
    weight = weight_of()
    solved, bias = solved_by(weight, **choices), torch.randn(ROWS)
    module = TunableLinear(solved, bias)
    torch.testing.assert_close(module.weight, solved.dequantize(), rtol=1e-6, atol=1e-8)
    x = torch.randn(5, COLUMNS)
    want = fp8.simulate(x).double() @ solved.dequantize().double().t() + bias.double()
    torch.testing.assert_close(module(x).double(), want, rtol=1e-5, atol=1e-5)
    result = module.result(weight)
    assert torch.equal(result.codes, solved.codes)
    assert torch.equal(result.scales.per_group(), solved.scales.per_group())
    assert result.weight_error == pytest.approx(solved.weight_error, rel=1e-5)


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_wherever_it_goes_it_can_be_stored(choices: dict[str, Any]) -> None:
    """What was tuned is what is written, and keeps the rules of the format."""
    weight = weight_of()
    module = TunableLinear(solved_by(weight, **choices), None)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter) * 0.2 * parameter.abs().mean().clamp_min(0.5)
        module.shift.mul_(5)
    module.confine()
    assert float(module.shift.detach().abs().max()) == pytest.approx(REACH)
    result = module.result(weight)
    torch.testing.assert_close(module.weight, result.dequantize(), rtol=1e-6, atol=1e-8)
    factors = result.factors
    triple = None if factors is None else (factors.A, factors.B, factors.scale)
    packed = pack("layer", result.codes, result.scales, triple)
    packed.check()
    assert result.weight_error > 0
    moved = tunable._signed(result.codes) - tunable._signed(module.solved.codes)
    assert 0 < float((moved != 0).float().mean()) < 1
    assert float(moved.abs().max()) == 1


def test_only_doubtful_roundings_can_change() -> None:
    solved = solved_by(weight_of())
    module = TunableLinear(solved, None)
    off = (module.start - tunable._signed(solved.codes)).abs()
    assert float(off.max()) <= EDGE + 1e-6
    for sign in (-1, 1):
        with torch.no_grad():
            module.shift.fill_(sign * REACH)
        changed = module.result(weight_of()).codes != solved.codes
        assert not changed[off < 0.5 - REACH].any()


def test_gradients_are_those_without_rounding() -> None:
    weight = weight_of()
    module = TunableLinear(solved_by(weight, rank=3), None)
    direction = torch.randn(ROWS, COLUMNS)
    (module.weight * direction).sum().backward()
    assert module.shift.grad is not None
    place = module.start.double()
    table = torch.from_numpy(np.append(MAGNITUDES, 8.0))
    below = place.abs().long().clamp_max(7)
    slope = table[below + 1] - table[below]
    inside = (place.abs() < 7) & (place != 0)  # what starts at 0 exactly is a group of zeros
    columns = torch.arange(COLUMNS)
    want = slope * module.solved.scales.per_column(columns) * direction
    torch.testing.assert_close(module.shift.grad.double()[inside], want[inside].double())
    assert module.row_gain is not None
    assert module.row_gain.grad is not None
    assert module.A is not None
    assert module.A.grad is not None
    own = module.solved.dequantize() - module.solved.factors.product()  # type: ignore[union-attr]
    torch.testing.assert_close(module.row_gain.grad, (own * direction).sum(1, keepdim=True))
