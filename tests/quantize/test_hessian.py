"""Statistics and factorizations against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zqfp_convert.numerics import fp8
from zqfp_convert.quantize.hessian import (
    Curvature,
    HessianSum,
    activation_energy,
    aim_at_original,
    energy,
    prepare,
    relative,
    relative_error,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Inputs with a decaying spectrum, and features of different sizes."""
    mix = normal(features, features, seed=seed) * torch.logspace(0, -1.5, features)[:, None]
    sizes = torch.exp(normal(features, seed=seed + 1))
    return normal(tokens, features, seed=seed + 2) @ mix * sizes


def hessian_of(inputs: Tensor) -> Tensor:
    return (inputs.double().t() @ inputs.double() / len(inputs)).float()


def drift_of(curvature: Curvature) -> Tensor:
    """`(C - H) (H + damping I)^-1`, from what it does to the unit matrix."""
    unit = torch.eye(len(curvature.hessian))
    return aim_at_original(unit, curvature, 1.0) - unit


def damped(hessian: Tensor, damping: float) -> Tensor:
    H = hessian.double()
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


def close(have: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((have.double() - wanted).norm() <= tolerance * wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hessian_is_the_mean_over_all_tokens(dtype: torch.dtype) -> None:
    seen, original = correlated(60, 17).to(dtype), correlated(60, 17, seed=5).to(dtype)
    total = HessianSum(17, cross=True, device="cpu")
    total.add(seen[:24].view(2, 3, 4, 17), original[:24].view(2, 3, 4, 17))
    total.add(seen[24:25], original[24:25])
    total.add(seen[25:], original[25:])
    assert total.tokens == 60
    hessian, cross = total.mean()
    assert cross is not None
    assert hessian.dtype == cross.dtype == torch.float32
    assert close(hessian, seen.double().t() @ seen.double() / 60, 1e-6)
    assert close(cross, original.double().t() @ seen.double() / 60, 1e-6)
    assert (cross - cross.t()).norm() > 0.1 * cross.norm()  # so a transposed one would show


def test_without_cross() -> None:
    total = HessianSum(5, cross=False, device="cpu")
    total.add(normal(8, 5))
    hessian, cross = total.mean()
    assert cross is None
    assert close(hessian, normal(8, 5).double().t() @ normal(8, 5).double() / 8, 1e-6)


def test_cross_needs_the_original() -> None:
    with pytest.raises(AssertionError):
        HessianSum(5, cross=True, device="cpu").add(normal(8, 5))


def test_no_tokens() -> None:
    hessian, cross = HessianSum(5, cross=True, device="cpu").mean()
    assert cross is not None
    assert not hessian.any()
    assert not cross.any()


def factor_of(hessian: Tensor, damping: float, order: Tensor) -> Tensor:
    """The upper triangular R with `R R^T` the damped Hessian in that order."""
    last_first = order.flip(0)
    lower = torch.linalg.cholesky(damped(hessian, damping)[last_first][:, last_first])
    return lower.flip(0, 1)


@pytest.mark.parametrize("features", [1, 2, 33, 130])
@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("damping", [0.01, 0.2])
def test_factor_of_the_damped_hessian(
    features: int, activation_order: bool, damping: float
) -> None:
    hessian = hessian_of(correlated(3 * features, features))
    before = hessian.clone()
    curvature = prepare(hessian, None, damping=damping, activation_order=activation_order)
    assert torch.equal(hessian, before)
    assert torch.equal(curvature.hessian, before)
    R, order = curvature.feedback(0, features).double(), curvature.order
    assert close(R, factor_of(hessian, damping, order))
    assert close(R @ R.t(), damped(hessian, damping)[order][:, order])
    assert not R.tril(-1).any()
    assert curvature.factor.dtype == torch.float32
    assert curvature.mismatch is None
    assert (curvature.damping, curvature.retries) == (damping, 0)


def test_feedback_is_some_columns_of_the_factor() -> None:
    curvature = prepare(hessian_of(correlated(90, 30)), None, damping=0.01, activation_order=True)
    whole = curvature.feedback(0, 30)
    for start, end in [(0, 1), (0, 11), (7, 20), (29, 30), (12, 30)]:
        assert torch.equal(curvature.feedback(start, end), whole[:end, start:end])


def test_order() -> None:
    hessian = torch.diag(torch.tensor([1.0, 3.0, 0.0, 3.0, 2.0, 0.0]))
    natural = prepare(hessian, None, damping=0.01, activation_order=False)
    by_activation = prepare(hessian, None, damping=0.01, activation_order=True)
    assert natural.order.tolist() == list(range(6))
    assert by_activation.order.tolist() == [1, 3, 4, 0, 2, 5]


def test_equal_columns_keep_their_order() -> None:
    diagonal = torch.arange(400.0) % 2 + 1
    order = prepare(torch.diag(diagonal), None, damping=0.01, activation_order=True).order
    assert order.tolist() == [*range(1, 400, 2), *range(0, 400, 2)]


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_drift(activation_order: bool, damping: float) -> None:
    seen = correlated(200, 40)
    hessian = hessian_of(seen)
    cross = (correlated(200, 40, seed=9).double().t() @ seen.double() / 200).float()
    drift = drift_of(
        prepare(hessian, cross.clone(), damping=damping, activation_order=activation_order)
    )
    wanted = (cross - hessian).double() @ torch.linalg.inv(damped(hessian, damping))
    assert close(drift, wanted)
    assert not close(drift, wanted.t(), 0.5)


def test_drift_of_the_same_inputs_is_zero() -> None:
    hessian = hessian_of(correlated(100, 20))
    drift = drift_of(prepare(hessian, hessian.clone(), damping=0.01, activation_order=True))
    assert not drift.any()


def least_damping(hessian: Tensor, damping: float) -> tuple[float, int]:
    """The first of damping, 10 damping, 100 damping … that makes it positive definite."""
    retries = 0
    while torch.linalg.eigvalsh(damped(hessian, damping)).min() <= 0:
        damping, retries = damping * 10, retries + 1
    return damping, retries


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("negative", [0.005, 0.05, 0.5, 30.0])
def test_retries_of_an_indefinite_hessian_are_reported(
    activation_order: bool, negative: float
) -> None:
    rotation = torch.linalg.qr(normal(24, 24)).Q
    eigenvalues = torch.linspace(1, 3, 24)
    eigenvalues[0] = -negative
    eigenvalues *= 24 / eigenvalues.sum()  # mean diagonal 1
    hessian = rotation * eigenvalues @ rotation.t()
    hessian = (hessian + hessian.t()) / 2
    used, retries = least_damping(hessian, 0.01)
    curvature = prepare(hessian, None, damping=0.01, activation_order=activation_order)
    assert curvature.retries == retries
    assert curvature.damping == pytest.approx(used)
    assert torch.equal(curvature.hessian, hessian)
    wanted = factor_of(hessian, used, curvature.order)
    assert close(curvature.feedback(0, 24), wanted, 1e-3)


def test_the_indefinite_cases_do_retry() -> None:
    assert least_damping(torch.diag(torch.tensor([2.0, -0.005])), 0.01)[1] == 0
    assert least_damping(torch.diag(torch.tensor([2.0, -0.05])), 0.01)[1] == 1
    assert least_damping(torch.diag(torch.tensor([2.0, -0.9])), 0.01)[1] == 3


def test_drift_uses_the_damping_of_the_retry() -> None:
    hessian = torch.diag(torch.tensor([2.0, -0.05, 1.0, 1.0]))
    cross = hessian + normal(4, 4)
    curvature = prepare(hessian, cross.clone(), damping=0.01, activation_order=True)
    assert curvature.retries == 1
    wanted = (cross - hessian).double() @ torch.linalg.inv(damped(hessian, 0.1))
    assert close(drift_of(curvature), wanted)


def test_a_singular_hessian_with_next_to_no_damping() -> None:
    direction = normal(16)
    hessian = torch.outer(direction, direction)
    curvature = prepare(hessian, None, damping=1e-12, activation_order=False)
    assert curvature.retries > 0
    assert curvature.damping == pytest.approx(1e-12 * 10**curvature.retries)
    assert curvature.factor.isfinite().all()


@pytest.mark.parametrize("activation_order", [False, True])
def test_an_all_zero_hessian(activation_order: bool) -> None:
    zero = torch.zeros(9, 9)
    curvature = prepare(zero, zero.clone(), damping=0.01, activation_order=activation_order)
    torch.testing.assert_close(curvature.factor, 0.1 * torch.eye(9))  # the root of the damping
    assert curvature.order.tolist() == list(range(9))
    assert not drift_of(curvature).any()
    assert curvature.retries == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_the_programs_fault(bad: float) -> None:
    hessian = torch.eye(4)
    hessian[1, 1] = bad
    with pytest.raises(AssertionError, match="NaN or infinity"):
        prepare(hessian, None, damping=0.01, activation_order=False)


def test_asymmetry_1_is_least_squares() -> None:
    original = correlated(400, 24)
    seen = original + 0.3 * correlated(400, 24, seed=7)
    weight = normal(10, 24, seed=3)
    total = HessianSum(24, cross=True, device="cpu")
    total.add(seen, original)
    hessian, cross = total.mean()
    curvature = prepare(hessian, cross, damping=1e-7, activation_order=True)
    outputs = original.double() @ weight.double().t()
    best = torch.linalg.lstsq(seen.double(), outputs).solution.t()
    assert close(aim_at_original(weight, curvature, 1.0), best, 1e-2)
    assert not close(weight, best, 0.05)
    assert torch.equal(aim_at_original(weight, curvature, 0.0), weight)
    halfway = (weight + aim_at_original(weight, curvature, 1.0)) / 2
    assert close(aim_at_original(weight, curvature, 0.5), halfway.double(), 1e-6)


def test_outputs_of_the_weight_do_what_the_inputs_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """`W C` in the place of C, for a weight and for some of its rows."""
    monkeypatch.setattr("zqfp_convert.quantize.hessian.COLUMNS", 7)
    original = correlated(400, 24)
    seen = original + 0.3 * correlated(400, 24, seed=7)
    weight = normal(10, 24, seed=3)
    by_inputs = HessianSum(24, cross=True, device="cpu")
    by_outputs = HessianSum(24, cross=True, device="cpu", rows=10)
    for part in (slice(0, 150), slice(150, 400)):
        by_inputs.add(seen[part], original[part])
        by_outputs.add(seen[part], original[part] @ weight.t())
    hessian, cross = by_inputs.mean()
    same, outputs = by_outputs.mean()
    assert outputs is not None
    assert torch.equal(same, hessian)
    assert outputs.shape == (10, 24)
    how = {"damping": 0.01, "activation_order": True}
    want = aim_at_original(weight, prepare(hessian.clone(), cross, **how), 1.0)
    curvature = prepare(hessian, None, outputs=outputs, **how)
    have = aim_at_original(weight, curvature, 1.0)
    assert close(have - weight, (want - weight).double(), 1e-4)
    assert not close(have, weight.double(), 0.05)
    rows = slice(3, 8)
    some = aim_at_original(weight[rows], curvature, 1.0, rows)
    assert close(some, have[rows].double(), 1e-6)
    assert torch.equal(aim_at_original(weight, curvature, 0.0), weight)
    curvature.forget_original()
    assert torch.equal(aim_at_original(weight, curvature, 1.0), weight)


def test_relative_error() -> None:
    error, weight = normal(6, 12), normal(6, 12, seed=1) * 3
    hessian = hessian_of(correlated(50, 12))
    E, W, H = error.double(), weight.double(), hessian.double()
    with_hessian = (torch.trace(E @ H @ E.t()) / torch.trace(W @ H @ W.t())).sqrt().item()
    assert relative_error(error, weight, hessian) == pytest.approx(with_hessian, rel=1e-5)
    assert relative_error(error, weight, None) == pytest.approx((E.norm() / W.norm()).item())
    assert relative_error(weight, weight, hessian) == pytest.approx(1)


def test_relative_error_where_there_is_nothing() -> None:
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert relative_error(zero, zero, None) == 0
    assert relative_error(one, zero, torch.eye(3)) == 0
    assert relative_error(one, one, torch.zeros(3, 3)) == 0
    assert relative_error(zero, one, torch.eye(3)) == 0
    rounded_below_zero = torch.diag(torch.tensor([1.0, 1.0, -1e-9]))
    assert relative_error(torch.tensor([[0.0, 0.0, 1.0]]), one[:1], rounded_below_zero) == 0


def test_the_error_of_activations() -> None:
    """Against outputs measured directly, with features of all sizes."""
    generator = torch.Generator().manual_seed(5)
    size = torch.exp2(torch.linspace(-4, 4, 64))
    x = torch.randn(4096, 64, generator=generator) * size
    weight = torch.randn(48, 64, generator=generator)
    seen = fp8.simulate(x)
    rounding = (x - seen).square().mean(0)
    lost = float(activation_energy(weight, rounding))
    found = relative(lost, energy(weight, seen.t() @ seen / len(seen)))
    want = ((x - seen) @ weight.t()).norm() / (seen @ weight.t()).norm()
    assert 0.01 < want < 0.04
    assert found == pytest.approx(float(want), rel=0.03)
    assert activation_energy(torch.zeros(4, 64), rounding) == 0


def test_panels_sum_up_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from zqfp_convert.quantize import hessian as module

    monkeypatch.setattr(module, "PANEL", 5)
    monkeypatch.setattr(module, "SLICE", 7)
    seen, original = correlated(60, 17), correlated(60, 17, seed=5)
    total = HessianSum(17, cross=True, device="cpu")
    total.add(seen[:20], original[:20])
    total.add(seen[20:], original[20:])
    hessian, cross = total.mean()
    assert cross is not None
    torch.testing.assert_close(hessian, hessian.t(), rtol=1e-6, atol=1e-6)  # panels' own squares
    assert close(hessian, hessian_of(seen).double(), 1e-6)
    whole = cross - hessian
    sliced = prepare(hessian, cross, damping=0.01, activation_order=True)
    monkeypatch.setattr(module, "SLICE", 100)
    at_once = prepare(hessian, whole + hessian, damping=0.01, activation_order=True)
    assert torch.equal(sliced.factor, at_once.factor)
    assert close(drift_of(sliced), drift_of(at_once).double(), 1e-5)
