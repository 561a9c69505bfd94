"""One weight: GPTQ stays on the grid and beats rounding, LoRC gives some of the error back."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zqfp_convert.compare.configuration import Configuration
from zqfp_convert.compare.formats import FORMATS
from zqfp_convert.compare.placement import place
from zqfp_convert.compare.weights import solve
from zqfp_convert.quantize.hessian import prepare, relative_error

sys.path.append(str(Path(__file__).parents[1] / "quantize"))
from problems import correlated_hessian, normal

N, K, GROUP = 48, 160, 64


def problem() -> tuple[Tensor, Tensor]:
    return normal(N, K) + 0.2, correlated_hessian(K)


@pytest.mark.parametrize("name", FORMATS)
def test_gptq_beats_rounding_on_the_same_grid(name: str) -> None:
    weight, hessian = problem()
    curvature = prepare(hessian, None, damping=0.01, activation_order=False)
    configuration = Configuration(weights=name, group_size=GROUP)
    solved, bits = solve(weight, curvature, configuration)
    rounded, same_bits = solve(weight, curvature, replace(configuration, solver="round"))
    assert bits == same_bits
    placed = place(weight, FORMATS[name], GROUP)
    assert torch.equal(rounded, placed.quantize(weight))
    torch.testing.assert_close(placed.quantize(solved), solved, rtol=0, atol=1e-5)  # on the grid
    error = relative_error(weight - solved, weight, hessian)
    assert error < 0.9 * relative_error(weight - rounded, weight, hessian)


@pytest.mark.parametrize("solver", ["round", "gptq"])
def test_low_rank_compensation(solver: str) -> None:
    weight, hessian = problem()
    curvature = prepare(hessian, None, damping=0.01, activation_order=False)
    configuration = Configuration(weights="e2m1", group_size=GROUP, solver=solver)
    bare, bits = solve(weight, curvature, configuration)
    helped, more = solve(weight, curvature, replace(configuration, rank=8))
    assert (weight - helped).norm() < 0.9 * (weight - bare).norm()
    assert more - bits == 8 * (8 * (N + K) + 32)


def test_a_whole_row_and_bits() -> None:
    weight, _ = problem()
    _, bits = solve(weight, None, Configuration(weights="int8", group_size=0))
    assert bits == 8 * N * K + 16 * N
    _, bits = solve(weight, None, Configuration(weights="e2m1", scales="m2", group_size=GROUP))
    assert bits == 4 * N * K + 8 * N * 3 + 16 * N
