"""Coordinate descent against a naive loop; what it may never do is make the error larger."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import VALUES, OnGrid, correlated_hessian, nearest, normal, on_grid
from torch import Tensor

from zqfp_convert.quantize.descent import descend

ROWS = 12


def naive(
    target: Tensor, rounded: Tensor, hessian: Tensor, scale: Tensor, sweeps: int
) -> np.ndarray:
    """One coordinate at a time, the gradient computed anew for each, in float64."""
    W, Q, H, S = (tensor.double().numpy().copy() for tensor in (target, rounded, hessian, scale))
    for _ in range(sweeps):
        for j in range(len(H)):
            if H[j, j] > 0:
                best = Q[:, j] + (W - Q) @ H[:, j] / H[j, j]
                Q[:, j] = on_grid(best / S[:, j]) * S[:, j]
    return Q


def scales_for(rows: int, features: int) -> Tensor:
    """Different for each row and each column."""
    return torch.exp2(normal(rows, features, seed=77).clamp(-1, 1)) / 2.5


def energy(error: Tensor, hessian: Tensor) -> float:
    """`tr(E H E^T)`."""
    E = error.double()
    return float(((E @ hessian.double()) * E).sum())


def problem(features: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Target, its rounding, Hessian and scales."""
    target, scale = normal(ROWS, features, seed=seed), scales_for(ROWS, features)
    return target, nearest(target, scale), correlated_hessian(features, seed=seed), scale


@pytest.mark.parametrize("features", [1, 2, 40, 128, 130, 257])
@pytest.mark.parametrize("sweeps", [1, 3])
def test_same_as_the_naive_loop(features: int, sweeps: int) -> None:
    target, rounded, hessian, scale = problem(features)
    result = descend(target, rounded, hessian, OnGrid(scale), sweeps)
    wanted = naive(target, rounded, hessian, scale, sweeps)
    differ = ~np.isclose(result.double().numpy(), wanted, rtol=1e-5, atol=0)
    # A value within float32's rounding of a tie may fall to the other side and change its row.
    assert differ.any(1).sum() <= 1
    if features > 2:
        assert (result != rounded).float().mean() > 0.05


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 150), st.booleans())
def test_the_error_never_increases(seed: int, features: int, random_start: bool) -> None:
    target, rounded, hessian, scale = problem(features, seed)
    if random_start:  # from anywhere on the grid, not only from the nearest point
        rounded = nearest(normal(ROWS, features, seed=seed + 1), scale)
    errors = [energy(target - rounded, hessian)]
    for _ in range(4):
        rounded = descend(target, rounded, hessian, OnGrid(scale), 1)
        errors.append(energy(target - rounded, hessian))
    whole = energy(target, hessian)
    for earlier, later in itertools.pairwise(errors):
        assert later <= earlier + 1e-6 * whole


def test_the_error_falls() -> None:
    target, rounded, hessian, scale = problem(96)
    result = descend(target, rounded, hessian, OnGrid(scale), 3)
    assert energy(target - result, hessian) < 0.6 * energy(target - rounded, hessian)


def test_sweeps_add_up() -> None:
    target, rounded, hessian, scale = problem(140)
    at_once = descend(target, rounded, hessian, OnGrid(scale), 2)
    one = descend(target, rounded, hessian, OnGrid(scale), 1)
    one_more = descend(target, one, hessian, OnGrid(scale), 1)
    assert (at_once != one_more).any(1).sum() <= 1  # but for ties
    assert not torch.equal(one, at_once)


def test_no_sweeps_change_nothing() -> None:
    target, rounded, hessian, scale = problem(40)
    result = descend(target, rounded, hessian, OnGrid(scale), 0)
    assert torch.equal(result, rounded)


def test_arguments_stay_as_they_are() -> None:
    arguments = problem(40)
    before = [tensor.clone() for tensor in arguments]
    target, rounded, hessian, scale = arguments
    descend(target, rounded, hessian, OnGrid(scale), 2)
    # A contiguous transpose must not be taken for a copy.
    one = descend(target[:, :1], rounded[:, :1], hessian[:1, :1], OnGrid(scale), 1)
    assert one.shape == (ROWS, 1)
    assert all(torch.equal(now, then) for now, then in zip(arguments, before, strict=True))


def test_every_element_is_on_the_grid_of_its_scale() -> None:
    target, rounded, hessian, scale = problem(130)
    result = descend(target, rounded, hessian, OnGrid(scale), 2)
    assert torch.equal(result, nearest(result, scale))
    assert result.dtype == torch.float32
    assert result.is_contiguous()


def test_where_it_stops_no_single_change_helps() -> None:
    target, result, hessian, scale = problem(40)
    for _ in range(50):
        before = result
        result = descend(target, before, hessian, OnGrid(scale), 1)
        if torch.equal(result, before):
            break
    else:
        raise AssertionError("no fixed point in 50 sweeps")
    E, H = (target - result).double(), hessian.double()
    for value in (*VALUES, *-VALUES):
        move = value * scale.double() - result.double()  # of each element alone
        change = H.diagonal() * move.square() - 2 * move * (E @ H)
        assert change.min() >= -1e-5 * energy(target, hessian)


def test_an_exact_target_is_kept() -> None:
    _, rounded, hessian, scale = problem(60)
    assert torch.equal(descend(rounded, rounded, hessian, OnGrid(scale), 2), rounded)


def test_dead_columns_are_left_alone() -> None:
    target, rounded, hessian, scale = problem(140)
    dead = torch.tensor([0, 9, 127, 128, 139])
    hessian[dead] = 0
    hessian[:, dead] = 0
    rounded[:, dead] = 6 * scale[:, dead]  # far from the target: still nobody's business
    result = descend(target, rounded, hessian, OnGrid(scale), 3)
    assert torch.equal(result[:, dead], rounded[:, dead])
    wanted = naive(target, rounded, hessian, scale, 3)
    differ = ~np.isclose(result.double().numpy(), wanted, rtol=1e-5, atol=0)
    assert differ.any(1).sum() <= 1


def test_an_all_zero_hessian_changes_nothing() -> None:
    target, rounded, _, scale = problem(20)
    result = descend(target, rounded, torch.zeros(20, 20), OnGrid(scale), 3)
    assert torch.equal(result, rounded)


@pytest.mark.parametrize("tiny", [1e-38, 1e-40, 1e-45])
def test_columns_that_saw_next_to_nothing(tiny: float) -> None:
    """`1 / H_jj` overflows below 2.9e-39, and infinity times a zero gradient is NaN."""
    target, rounded, hessian, scale = problem(20)
    hessian[3] = 0
    hessian[:, 3] = 0
    hessian[3, 3] = tiny
    target[:2, 3] = rounded[:2, 3] = 0
    result = descend(target, rounded, hessian, OnGrid(scale), 2)
    assert result.isfinite().all()
    assert energy(target - result, hessian) <= energy(target - rounded, hessian)
