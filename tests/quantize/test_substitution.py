"""Division by a factorized matrix against float64, also with factors rounded as on tensor cores."""

from __future__ import annotations

import pytest
import torch
from problems import correlated_hessian, normal
from torch import Tensor

from zqfp_convert.quantize import substitution, tensor_cores
from zqfp_convert.quantize.substitution import BLOCK, divide

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def damped(features: int, condition: float, seed: int = 0) -> Tensor:
    """A Hessian of that condition, float64; its features go from the least to the most active."""
    hessian = correlated_hessian(features, seed=seed, decades=3).double()
    order = hessian.diagonal().argsort()
    hessian = hessian[order][:, order]
    largest = torch.linalg.eigvalsh(hessian)[-1]
    return hessian + largest / condition * torch.eye(features, dtype=torch.float64)


def quotient(rows: Tensor, hessian: Tensor) -> Tensor:
    found: Tensor = torch.linalg.solve(hessian, rows.double(), left=False)
    return found


@pytest.mark.parametrize("features", [1, 2, 33, 64, 130, 257, BLOCK - 2, BLOCK, BLOCK + 1, 1100])
def test_divides(features: int) -> None:
    hessian, rows = damped(features, 1e3), normal(7, features)
    lower = torch.linalg.cholesky(hessian).float().to(DEVICE)
    wide = torch.cat([rows, rows], 1).to(DEVICE)
    divide(wide[:, features:], lower)  # of a larger matrix
    wanted = quotient(rows, hessian)
    found = wide[:, features:].cpu().double()
    assert (found - wanted).norm() <= 2e-3 * wanted.norm()  # 1e-4 but for a GPU's tensor cores
    assert torch.equal(wide[:, :features].cpu(), rows)


@pytest.mark.parametrize("features", [64, 120, 130, 192])
def test_blocks_make_no_difference(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lower, whole = torch.linalg.cholesky(damped(features, 1e3)).float(), normal(7, features)
    rows = whole.clone()
    divide(whole, lower)
    monkeypatch.setattr(substitution, "BLOCK", 32)
    monkeypatch.setattr(substitution, "LEAF", 8)
    divide(rows, lower)
    torch.testing.assert_close(rows, whole, rtol=1e-3, atol=1e-4)


def in_11_bits(matrix: Tensor) -> Tensor:
    """Rounded to nearest, ties to even."""
    bits = matrix.contiguous().view(torch.int32)
    return (bits + 0xFFF + (bits >> 13 & 1) & -0x2000).view(torch.float32)


def test_rounded_is_rounded_to_11_bits() -> None:
    values = normal(1 << 16) * torch.logspace(-30, 30, 1 << 16)
    found = tensor_cores.rounded(values)
    assert torch.equal(found, in_11_bits(found))
    assert ((found - values).abs() <= values.abs() * 2.0**-11).all()
    near = (found - in_11_bits(values)) == 0
    assert near.float().mean() > 0.99  # but for ties
    assert tensor_cores.rounded(torch.tensor([torch.nan])).isnan().all()


class Cores:
    """Float32 products as a GPU's tensor cores make them: factors are rounded, sums are not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain, adding = Tensor.__matmul__, Tensor.addmm_

        def product(left: Tensor, right: Tensor) -> Tensor:
            if left.dtype != torch.float32:
                return plain(left, right)
            return plain(in_11_bits(left), in_11_bits(right))

        def added(total: Tensor, left: Tensor, right: Tensor, **scales: float) -> Tensor:
            return adding(total, in_11_bits(left), in_11_bits(right), **scales)

        monkeypatch.setattr(Tensor, "__matmul__", product)
        monkeypatch.setattr(Tensor, "addmm_", added)
        monkeypatch.setattr(tensor_cores, "on_tensor_cores", lambda matrix: True)


def test_products_of_float32_on_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = normal(30, 200), normal(200, 40, seed=1)
    wanted = left.double() @ right.double()
    Cores(monkeypatch)
    coarse = (left @ right - wanted).norm() / wanted.norm()
    fine = (tensor_cores.float32_product(left, right) - wanted).norm() / wanted.norm()
    assert coarse > 1e-4
    assert fine < 1e-6


@pytest.mark.parametrize("condition", [1e4, 1e5, 1e6])
def test_as_good_as_the_inverse_on_tensor_cores(
    condition: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two products with the inverse of the factor, of which the first is made in float32."""
    features = 600
    monkeypatch.setattr(substitution, "BLOCK", 96)
    errors: dict[str, list[Tensor]] = {"inverse": [], "substitution": []}
    for seed in range(3):
        hessian = damped(features, condition, seed=10 * seed)
        lower = torch.linalg.cholesky(hessian.float())
        rows = normal(20, features, seed=seed + 1) @ lower.t()  # sums over inputs
        wanted = quotient(rows, hessian)
        inverse = torch.linalg.solve_triangular(lower, torch.eye(features), upper=False)
        with monkeypatch.context() as cores:
            Cores(cores)
            found = {"inverse": rows @ inverse.t() @ inverse, "substitution": rows.clone()}
            divide(found["substitution"], lower)
        for name, result in found.items():
            error = result.double() - wanted
            errors[name].append((error @ hessian * error).sum() / (wanted @ hessian * wanted).sum())
    inverse, substituted = (torch.stack(each).mean().sqrt() for each in errors.values())
    assert inverse > 1e-4  # products are rounded
    assert substituted < inverse
