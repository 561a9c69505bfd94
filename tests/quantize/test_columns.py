"""Settling a block of columns: its kernel and plain torch, against a naive loop in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import correlated_hessian, normal
from torch import Tensor

from zqfp_convert.numerics import codebook, kernels, scales
from zqfp_convert.numerics.scales import Scales
from zqfp_convert.quantize import columns
from zqfp_convert.quantize.descent import descend
from zqfp_convert.quantize.gptq import gptq
from zqfp_convert.quantize.hessian import prepare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 20
BOOKS = [(codebook.E2M1,), codebook.PAIR]

needs_triton = pytest.mark.skipif(not kernels.available(), reason="no Triton")


def naive(
    block: Tensor,
    pulls: Tensor,
    coupling: Tensor,
    places: Tensor,
    grid: Scales,
    step: Tensor,
) -> tuple[np.ndarray, np.ndarray]:
    """Column by column in float64: the rounded block and the moves."""
    V, C = block.double() + pulls.double() * step.double(), coupling.double() * step.double()
    moves = torch.zeros_like(V)
    for j in range(V.shape[1]):
        rounded = grid.round(V[:, j], grid.marks(places[j : j + 1])[:, 0])
        moves[:, j] = rounded - block[:, j]
        V[:, j] = rounded
        V[:, j + 1 :] -= moves[:, j : j + 1] * C[j, j + 1 :]
    return V.cpu().numpy(), moves.cpu().numpy()


def part(
    width: int, books: tuple[codebook.Codebook, ...], device: str
) -> tuple[Tensor, Scales, Tensor]:
    """Weights of which a block is taken, their scales, and which columns the block has."""
    weight = normal(ROWS, width + 30).to(device)
    grid = scales.choose(weight, "m2", "search", 32, None, books)
    places = torch.randperm(width + 30, generator=torch.Generator().manual_seed(3))[:width]
    return weight, grid, places.to(device)


def close(found: Tensor, wanted: np.ndarray) -> bool:
    """But for the odd value that lies on a tie and takes its row with it."""
    atol = 2e-3 if found.is_cuda else 1e-5  # products of earlier columns are in TF32 there
    rows = np.isclose(found.double().cpu().numpy(), wanted, rtol=1e-4, atol=atol).all(1)
    return bool(rows.mean() > 0.9)


def check(
    settle: Callable[..., None],
    width: int,
    again: bool,
    books: tuple[codebook.Codebook, ...],
    device: str,
) -> None:
    weight, grid, places = part(width, books, device)
    whole = weight[:, places].clone()
    step = 0.5 + torch.rand(width, generator=torch.Generator().manual_seed(4)).to(device)
    if again:
        whole = grid.round(whole, grid.marks(places))
        step[: width // 8] = 0  # columns without input
    block = torch.cat([whole, whole], 1)[:, width:]  # of a larger matrix
    moves = torch.cat([0.3 * weight, weight], 1)[:, :width]
    coupling = (0.5 * width**-0.5 * normal(width, 2 * width, seed=1)).to(device)[:, :width]
    wanted, moved = naive(block, moves, coupling, places, grid, step)
    settle(block, moves, coupling, grid.marks(places), grid, step)
    assert close(block, wanted)
    assert close(moves, moved)
    if again:
        assert torch.equal(block[:, : width // 8], whole[:, : width // 8])


@needs_triton
@pytest.mark.parametrize("books", BOOKS)
@pytest.mark.parametrize("width", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("again", [False, True])
def test_the_kernel_does_what_the_naive_loop_does(
    width: int, again: bool, books: tuple[codebook.Codebook, ...]
) -> None:
    from zqfp_convert.quantize.kernels.columns import settle

    check(settle, width, again, books, DEVICE)


@pytest.mark.parametrize("again", [False, True])
def test_plain_torch_does_what_the_naive_loop_does(again: bool) -> None:
    check(columns.settle, 70, again, codebook.PAIR, "cpu")


@needs_triton
def test_solvers_with_the_kernel_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """More columns than a span: what comes out is on the grid, and no worse than without it."""
    for module in ("gptq", "descent"):
        monkeypatch.setattr(f"zqfp_convert.quantize.{module}.SPAN", 64)
        monkeypatch.setattr(f"zqfp_convert.quantize.{module}.at_once", lambda matrix: 32)
    features = 100
    weight, hessian = normal(ROWS, features).to(DEVICE), correlated_hessian(features).to(DEVICE)
    curvature = prepare(hessian, None, damping=0.01, activation_order=True)
    grid = scales.choose(weight, "m2", "search", 32, hessian.diagonal(), codebook.PAIR)
    found = {}
    for taken in (False, True):
        monkeypatch.setattr(kernels, "take", lambda tensor, taken=taken: taken)
        once = gptq(weight, curvature, grid)
        found[taken] = once, descend(weight, once, hessian, grid, 2)
    for plain, fused in zip(found[False], found[True], strict=True):
        assert torch.equal(fused, grid.round(fused, grid.marks(torch.arange(features))))
        assert (plain == fused).float().mean() > 0.75  # one tie moves a whole row
        error, other = ((weight - one).double() for one in (plain, fused))
        energies = [float(((e @ hessian.double()) * e).sum()) for e in (error, other)]
        assert energies[1] < 1.02 * energies[0]
