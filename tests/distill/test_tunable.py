"""A linear that can be tuned: what it stands for, its gradients, and what it becomes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from zqfp_convert.checkpoint.packed import pack
from zqfp_convert.distill import grid
from zqfp_convert.distill.adam import ONE
from zqfp_convert.distill.grid import Grid
from zqfp_convert.distill.memory import PLACE
from zqfp_convert.distill.tunable import EDGE, REACH, TunableLinear, signed
from zqfp_convert.numerics import codebook, fp8
from zqfp_convert.numerics.scales import Scales
from zqfp_convert.quantize.hessian import Curvature, HessianSum, prepare
from zqfp_convert.quantize.weight import QuantizedWeight, quantize_weight
from zqfp_convert.recipe import Recipe

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


def own(module: TunableLinear) -> list[torch.nn.Parameter]:
    """What has a value of its own."""
    return [p for p in (module.row_gain, module.A, module.B) if p is not None]


def curvature() -> Curvature:
    total = HessianSum(COLUMNS, cross=False, device="cpu")
    total.add(torch.randn(400, COLUMNS) @ torch.randn(COLUMNS, COLUMNS))
    hessian, cross = total.mean()
    return prepare(hessian, cross, damping=0.01, activation_order=True)


def solved_by(weight: Tensor, **choices: Any) -> QuantizedWeight:
    choices = {"group_size": 32, "codebooks": "e2m1", "rank": 0, "tune": 1} | choices
    return quantize_weight(weight, curvature(), Recipe.named("best", **choices))


@pytest.mark.parametrize("book", [codebook.E2M1, *codebook.PAIR])
@pytest.mark.parametrize("second", [False, True])
def test_places_are_the_grid_drawn_out(book: codebook.Codebook, second: bool) -> None:
    values = np.linspace(-8, 8, 3201).astype(np.float32)
    books = (codebook.E2M1, book) if second else (book,)
    choice = torch.ones(1, 1, dtype=torch.bool) if second else None
    scale = Scales("free", torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int16), 4000, 0, books)
    drawn = Grid.of(replace(scale, choice=choice), len(values))
    rows, size = slice(0, 1), np.abs(values)
    have = drawn.place_of(torch.from_numpy(values)[None], rows)[0]
    want = np.interp(size, book, np.arange(8))
    beyond = 7 + (size - book[7]) / (book[7] - book[6])
    want = np.where(size > book[7], beyond, want) * np.sign(values)
    np.testing.assert_allclose(have.numpy(), want, atol=1e-5)
    nearest = np.sign(want) * np.array(book)[np.round(np.abs(want)).clip(0, 7).astype(int)]
    clear = np.abs(np.abs(want) % 1 - 0.5) > 1e-4
    rounded = drawn.value(have[None], rows)[0].numpy()
    np.testing.assert_array_equal(rounded[clear], nearest[clear].astype(np.float32))


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_it_starts_as_what_was_solved(choices: dict[str, Any]) -> None:
    weight = weight_of()
    solved, bias = solved_by(weight, **choices), torch.randn(ROWS)
    module = TunableLinear(solved, bias)
    torch.testing.assert_close(module.weight(), solved.dequantize(), rtol=1e-6, atol=1e-8)
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
    solved = solved_by(weight, **choices)
    module = TunableLinear(solved)
    with torch.no_grad():
        assert module.shift is not None
        module.shift.random_(-ONE, ONE + 1)
        for parameter in own(module):
            parameter += torch.randn_like(parameter) * 0.2 * parameter.abs().mean().clamp_min(0.5)
    result = module.result(weight)
    torch.testing.assert_close(module.weight(), result.dequantize(), rtol=1e-6, atol=1e-8)
    factors = result.factors
    triple = None if factors is None else (factors.A, factors.B, factors.scale)
    packed = pack("layer", result.codes, result.scales, triple)
    packed.check()
    assert result.weight_error > 0
    moved = signed(result.codes) - signed(solved.codes)
    assert 0 < float((moved != 0).float().mean()) < 1
    assert float(moved.abs().max()) == 1


def test_only_doubtful_roundings_can_change() -> None:
    solved = solved_by(weight_of())
    module = TunableLinear(solved)
    assert module.shift is not None
    off = (module.start.float() - signed(solved.codes)).abs()
    assert float(off.max()) <= EDGE + 2e-3  # float16
    for sign in (-1, 1):
        with torch.no_grad():
            module.shift.fill_(sign * ONE)
        changed = module.result(weight_of()).codes != solved.codes
        assert changed.any()
        assert not changed[off < 0.5 - REACH].any()


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("rows_at_once", [1, 7, ROWS])
def test_gradients_are_those_of_autograd(
    choices: dict[str, Any], rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "ELEMENTS_AT_ONCE", rows_at_once * COLUMNS)
    solved = solved_by(weight_of(), **choices)
    module = TunableLinear(solved)
    names = [name for name in ("handle", "row_gain", "A", "B") if getattr(module, name) is not None]
    with torch.no_grad():
        assert module.shift is not None
        module.shift.random_(-ONE, ONE + 1)
        for name in names[1:]:
            getattr(module, name).add_(torch.randn_like(getattr(module, name)) * 0.01)
        if module.A is not None:
            module.A[0, 0] = 500.0  # beyond E4M3: no gradient
    learnt = {name: getattr(module, name).detach().double() for name in names}
    learnt["handle"] = module.shift.double() / ONE
    for value in learnt.values():
        value.requires_grad_()
    direction = torch.randn(ROWS, COLUMNS)
    want = reference.weight_of(module, solved, learnt)
    (want * direction).sum().backward()
    have = module.weight()
    (have * direction).sum().backward()
    torch.testing.assert_close(have.double(), want, rtol=1e-6, atol=1e-8)
    for name in names:
        gradient, parameter = learnt[name].grad, getattr(module, name)
        assert parameter.grad.dtype == parameter.dtype
        assert parameter.grad.abs().max() > 0
        wanted = gradient.to(parameter.dtype)
        torch.testing.assert_close(parameter.grad, wanted, rtol=2e-2 if name == "handle" else 1e-4,
                                   atol=1e-5 * float(wanted.abs().max()))  # fmt: skip


def test_a_row_of_zeros_stays_one() -> None:
    module = TunableLinear(solved_by(weight_of(), rank=0))
    module.weight().square().add(module.weight()).sum().backward()
    assert module.handle is not None
    assert module.handle.grad is not None
    assert not module.handle.grad[1].any()


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass() -> None:
    module = TunableLinear(solved_by(weight_of(), rank=3))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module.weight()
    assert module.shift is not None
    assert module.handle is not None
    assert module.handle.untyped_storage().nbytes() == 2
    assert kept
    assert all(t.numel() < ROWS * COLUMNS / 2 for t in kept)
    assert module.shift.element_size() + module.start.element_size() == PLACE[True]


def test_roundings_left_as_they_are() -> None:
    weight = weight_of()
    solved = solved_by(weight, rank=3)
    module = TunableLinear(replace(solved, doubt=None), roundings=False)
    assert module.start.element_size() == PLACE[False]
    torch.testing.assert_close(module.weight(), solved.dequantize(), rtol=1e-6, atol=1e-8)
    module.weight().square().sum().backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} == {
        "row_gain", "A", "B"
    }  # fmt: skip
    with torch.no_grad():
        assert module.row_gain is not None
        module.row_gain.fill_(0.25)
    result = module.result(weight)
    assert torch.equal(result.codes, solved.codes)
    torch.testing.assert_close(module.weight(), result.dequantize(), rtol=1e-6, atol=1e-8)
    assert not torch.equal(result.scales.factor, solved.scales.factor)


def test_back_to_where_it_started() -> None:
    solved = solved_by(weight_of(), rank=3)
    module = TunableLinear(solved)
    with torch.no_grad():
        assert module.shift is not None
        module.shift.fill_(ONE)
        for parameter in own(module):
            parameter.add_(0.5)
    module.reset()
    torch.testing.assert_close(module.weight(), solved.dequantize(), rtol=1e-6, atol=1e-8)
