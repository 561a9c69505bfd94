"""GPTQ against a naive solver that eliminates one column at a time (as OBQ does).

The naive solver works with the inverse of the Hessian, as the paper does.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import OnGrid, correlated_hessian, nearest, normal, on_grid
from torch import Tensor

from zqfp_convert.quantize.columns import BLOCK, SPAN
from zqfp_convert.quantize.gptq import gptq
from zqfp_convert.quantize.hessian import prepare

ROWS = 16


def naive(
    weight: Tensor, hessian: Tensor, scale: Tensor, order: list[int], damping: float
) -> np.ndarray:
    """Round column after column; each time the inverse Hessian of what is left says who pays."""
    W, S, H = (tensor.double().numpy().copy() for tensor in (weight, scale, hessian))
    inverse = np.linalg.inv(H + damping * H.diagonal().mean() * np.eye(len(H)))
    inverse = inverse[np.ix_(order, order)]
    for done, k in enumerate(order):
        rest = order[done + 1 :]
        rounded = on_grid(W[:, k] / S[:, k]) * S[:, k]
        W[:, rest] -= np.outer((W[:, k] - rounded) / inverse[0, 0], inverse[0, 1:])
        W[:, k] = rounded
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return W


def scales_for(weight: Tensor, group_size: int = 32) -> Tensor:
    """Scales `[N, K]` of groups, from their root mean squares, so that some weights clip."""
    sizes = [part.square().mean(1).sqrt() for part in weight.split(group_size, 1)]
    return torch.stack(sizes, 1).repeat_interleave(group_size, 1)[:, : weight.shape[1]] / 2.7


def energy(error: Tensor, hessian: Tensor) -> float:
    """`tr(E H E^T)`."""
    E = error.double()
    return float(((E @ hessian.double()) * E).sum())


def solve(
    weight: Tensor, hessian: Tensor, *, activation_order: bool, damping: float = 0.01
) -> tuple[Tensor, Tensor, list[int]]:
    curvature = prepare(hessian, None, damping=damping, activation_order=activation_order)
    scale = scales_for(weight)
    return gptq(weight, curvature, OnGrid(scale)), scale, curvature.order.tolist()


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("features", [1, 2, 64, BLOCK, BLOCK + 1, 130, 257, SPAN, 600])
def test_same_as_the_naive_solver(features: int, activation_order: bool) -> None:
    weight, hessian = normal(ROWS, features), correlated_hessian(features)
    before = weight.clone()
    result, scale, order = solve(weight, hessian, activation_order=activation_order)
    assert torch.equal(weight, before)
    wanted = naive(weight, hessian, scale, order, 0.01)
    differ = ~np.isclose(result.double().numpy(), wanted, rtol=1e-5, atol=0)
    # A value within float32's rounding of a tie may fall to the other side, once in about 10^5,
    # and then changes what follows in its row: at most one row of the 16.
    assert differ.any(1).sum() <= 1
    if features > 2:
        rounded = nearest(weight, scale)
        assert (result != rounded).float().mean() > 0.05


@pytest.mark.parametrize("damping", [0.001, 0.5])
def test_other_dampings(damping: float) -> None:
    weight, hessian = normal(ROWS, 70), correlated_hessian(70)
    result, scale, order = solve(weight, hessian, activation_order=True, damping=damping)
    wanted = naive(weight, hessian, scale, order, damping)
    differ = ~np.isclose(result.double().numpy(), wanted, rtol=1e-5, atol=0)
    assert differ.any(1).sum() <= 1


@pytest.mark.parametrize("activation_order", [False, True])
def test_after_retries_it_is_the_damping_that_did(activation_order: bool) -> None:
    weight, hessian = normal(ROWS, 90), correlated_hessian(90)
    hessian -= 0.05 * hessian.diagonal().mean() * torch.eye(90)  # no longer positive definite
    assert prepare(hessian, None, damping=0.01, activation_order=activation_order).retries == 1
    result, scale, order = solve(weight, hessian, activation_order=activation_order)
    wanted = naive(weight, hessian, scale, order, 0.1)
    differ = ~np.isclose(result.double().numpy(), wanted, rtol=1e-5, atol=0)
    assert differ.any(1).sum() <= 1


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("features", [130, 257])
def test_every_element_is_on_the_grid_of_its_scale(features: int, activation_order: bool) -> None:
    weight, hessian = normal(ROWS, features), correlated_hessian(features)
    result, scale, _ = solve(weight, hessian, activation_order=activation_order)
    assert torch.equal(result, nearest(result, scale))
    assert result.shape == weight.shape
    assert result.dtype == torch.float32


@pytest.mark.parametrize("activation_order", [False, True])
def test_better_than_rounding(activation_order: bool) -> None:
    ratios = []
    for seed in range(30):
        weight, hessian = normal(ROWS, 96, seed=seed), correlated_hessian(96, seed=100 * seed)
        result, scale, _ = solve(weight, hessian, activation_order=activation_order)
        rounded = energy(weight - nearest(weight, scale), hessian)
        ratios.append(energy(weight - result, hessian) / rounded)
    assert max(ratios) < 1.0
    assert sum(ratios) / len(ratios) < 0.6


def test_activation_order_helps_where_features_differ() -> None:
    ratios = []
    for seed in range(30):
        weight, hessian = normal(ROWS, 96, seed=seed), correlated_hessian(96, seed=100 * seed)
        ordered, natural = (
            energy(weight - solve(weight, hessian, activation_order=order)[0], hessian)
            for order in (True, False)
        )
        ratios.append(ordered / natural)
    assert sum(ratios) / len(ratios) < 0.95


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("diagonal", ["zero", "equal", "different"])
def test_without_correlation_it_is_rounding(activation_order: bool, diagonal: str) -> None:
    weight = normal(ROWS, 150)
    sizes = {"zero": torch.zeros(150), "equal": torch.ones(150), "different": normal(150).square()}
    hessian = torch.diag(sizes[diagonal])
    result, scale, _ = solve(weight, hessian, activation_order=activation_order)
    assert torch.equal(result, nearest(weight, scale))


@pytest.mark.parametrize("activation_order", [False, True])
def test_dead_columns_are_rounded_and_pay_for_nobody(activation_order: bool) -> None:
    weight, hessian = normal(ROWS, 140), correlated_hessian(140)
    dead = torch.tensor([0, 5, 77, 128, 139])
    hessian[dead] = 0
    hessian[:, dead] = 0
    result, scale, order = solve(weight, hessian, activation_order=activation_order)
    assert torch.equal(result[:, dead], nearest(weight, scale)[:, dead])
    wanted = naive(weight, hessian, scale, order, 0.01)
    differ = ~np.isclose(result.double().numpy(), wanted, rtol=1e-5, atol=0)
    assert differ.any(1).sum() <= 1
    if activation_order:
        assert order[-5:] == dead.tolist()


def test_a_singular_hessian() -> None:
    direction = normal(40)
    hessian = torch.outer(direction, direction)
    weight = normal(ROWS, 40)
    result, scale, _ = solve(weight, hessian, activation_order=True)
    rounded = energy(weight - nearest(weight, scale), hessian)
    assert energy(weight - result, hessian) < 0.1 * rounded


def test_what_is_on_the_grid_stays() -> None:
    hessian = correlated_hessian(64)
    scale = scales_for(normal(ROWS, 64))
    weight = nearest(normal(ROWS, 64), scale)
    curvature = prepare(hessian, None, damping=0.01, activation_order=True)
    assert torch.equal(gptq(weight, curvature, OnGrid(scale)), weight)


def test_rows_do_not_see_each_other() -> None:
    weight, hessian = normal(ROWS, 130), correlated_hessian(130)
    curvature = prepare(hessian, None, damping=0.01, activation_order=True)
    scale = scales_for(weight)
    whole = gptq(weight, curvature, OnGrid(scale))
    part = gptq(weight[3:4], curvature, OnGrid(scale[3:4]))
    assert (whole[3:4] != part).float().mean() < 0.02  # but for ties
