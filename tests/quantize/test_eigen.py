"""Eigenvectors of small matrices: the kernel and LAPACK, by what makes vectors eigenvectors."""

from __future__ import annotations

import pytest
import torch
from problems import normal
from torch import Tensor

from zqfp_convert.numerics import kernels
from zqfp_convert.quantize import eigen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_triton = pytest.mark.skipif(not kernels.available(), reason="no Triton")


def steep(width: int) -> Tensor:
    rows = normal(2, width, 3 * width).double() * torch.logspace(0, -6, width)[:, None]
    return rows @ rows.mT


def flat(width: int) -> Tensor:
    return torch.eye(width) + 1e-3 * normal(2, width, width).double() / width


def low(width: int) -> Tensor:
    """Most eigenvalues are zero, so that only rounding tells them from one another."""
    rows = normal(2, width, max(1, width // 4)).double()
    return rows @ rows.mT


def spiked(width: int) -> Tensor:
    spike = normal(2, width, 1).double()
    return torch.eye(width) + 1e9 * spike @ spike.mT


KINDS = {
    "steep": steep,
    "flat": flat,
    "low": low,
    "spiked": spiked,
    "equal": lambda width: 7.0 * torch.eye(width).double().expand(2, -1, -1),
    "diagonal": lambda width: torch.diag_embed(normal(2, width).double().square()),
    "zeros": lambda width: torch.zeros(2, width, width).double(),
}


def check(matrices: Tensor, vectors: Tensor, tolerance: float) -> None:
    """That they are orthonormal, eigenvectors, in order, and of the largest eigenvalues."""
    G, V = ((matrices + matrices.mT) / 2).cpu().double(), vectors.cpu().double()
    count = V.shape[-1]
    size = G.abs().amax((-2, -1), keepdim=True)
    assert torch.allclose(V.mT @ V, torch.eye(count).double(), atol=tolerance)
    values = (V.mT @ G @ V).diagonal(dim1=-2, dim2=-1)
    assert bool(((G @ V - V * values[:, None, :]).abs() <= tolerance * size).all())
    wanted = torch.linalg.eigvalsh(G).flip(-1)[:, :count]
    assert bool(((values - wanted).abs() <= tolerance * size[..., 0]).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "count"), [(1, 1), (2, 1), (3, 3), (9, 4), (16, 8), (17, 4)])
@pytest.mark.parametrize("by", ["lapack", pytest.param("kernel", marks=needs_triton)])
def test_eigenvectors(
    by: str, width: int, count: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "take", lambda tensor: by == "kernel")
    matrices = KINDS[kind](width).to(DEVICE)
    found = eigen.leading(matrices, count)
    assert (found.shape, found.dtype) == ((2, width, count), torch.float64)
    check(matrices, found, 1e-11)
    single = matrices[0].float()
    found = eigen.leading(single, count)
    assert (found.shape, found.dtype) == ((width, count), torch.float32)
    check(single[None], found[None], 1e-5)


@needs_triton
def test_the_widest_one_and_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "take", lambda tensor: True)
    for width in (eigen.WIDEST, eigen.WIDEST + 8):
        matrices = steep(width).to(DEVICE)
        check(matrices, eigen.leading(matrices, width - 8), 1e-11)


@needs_triton
def test_what_is_not_finite_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "take", lambda tensor: True)
    matrices = torch.eye(4, device=DEVICE).repeat(3, 1, 1)
    matrices[0, 1, 2], matrices[1, 3, 3] = torch.nan, torch.inf
    found = eigen.leading(matrices, 2)
    assert found[:2].isnan().all()
    assert found[2].isfinite().all()
