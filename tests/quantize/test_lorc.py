"""Low-rank compensation: the optimum against float64's singular value decomposition."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from problems import correlated_hessian, normal
from torch import Tensor

from zqfp_convert.parallel import ALONE, Share
from zqfp_convert.quantize import lorc

Form = Literal["e4m3", "bf16"]


def rounding_error(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Nearly white, as the errors of rounding are, some rows and columns larger than others."""
    sizes = torch.exp(0.5 * normal(rows, 1, seed=seed + 1) + 0.5 * normal(columns, seed=seed + 2))
    return (torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) - 0.5) * sizes


def energy(error: Tensor, hessian: Tensor | None) -> float:
    """`tr(E H E^T)`."""
    E = error.double()
    return float((E * E).sum() if hessian is None else ((E @ hessian.double()) * E).sum())


def least_energy(error: Tensor, hessian: Tensor | None, rank: int) -> float:
    """What the best factors leave: the tail of the singular values of `E H^(1/2)`."""
    M = error.double()
    if hessian is not None:
        values, vectors = torch.linalg.eigh(hessian.double())
        M = M @ (vectors * values.clamp_min(0).sqrt()) @ vectors.t()
    return float(torch.linalg.svdvals(M)[rank:].square().sum())


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (40, 40), (9, 64), (64, 9)])
@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("metric", ["none", "hessian"])
def test_the_factors_are_the_best(shape: tuple[int, int], rank: int, metric: str) -> None:
    error = rounding_error(*shape)
    hessian = correlated_hessian(shape[1], decades=2.0) if metric == "hessian" else None
    B, A = lorc.fit(error, hessian, rank)
    assert B.shape == (shape[0], rank)
    assert A.shape == (rank, shape[1])
    assert B.dtype == A.dtype == torch.float32
    best = least_energy(error, hessian, rank)
    left = energy(error - B @ A, hessian)
    assert best * (1 - 1e-4) <= left <= best * 1.01
    assert torch.allclose(B.t() @ B, torch.eye(rank), atol=1e-4)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("metric", ["none", "hessian"])
@pytest.mark.parametrize("low", [False, True])
def test_a_stack_is_as_good_as_each_alone(metric: str, again: bool, low: bool) -> None:
    errors = torch.stack([rounding_error(48, 64, seed) for seed in (0, 7, 9)])
    if low:  # of one of them, so that columns of its basis depend on one another
        errors[1] = errors[1, :, :3] @ normal(3, 64)
    hessian = correlated_hessian(64, decades=2.0) if metric == "hessian" else None
    start = torch.stack([normal(48, 4, seed=seed) for seed in range(3)]) if again else None
    B, A = lorc.fit(errors, hessian, 4, start=start)
    assert B.shape == (3, 48, 4)
    assert A.shape == (3, 4, 64)
    for error, here, there in zip(errors, B, A, strict=True):
        best = least_energy(error, hessian, 4)
        limit = best * (1.1 if again else 1.01) + 1e-9 * energy(error, hessian)
        assert energy(error - here @ there, hessian) <= limit


def test_the_metric_matters() -> None:
    error, hessian = rounding_error(64, 96), correlated_hessian(96, decades=2.0)
    B, A = lorc.fit(error, hessian, 8)
    plain_B, plain_A = lorc.fit(error, None, 8)
    assert energy(error - B @ A, hessian) < 0.9 * energy(error - plain_B @ plain_A, hessian)
    assert energy(error - B @ A, None) > 1.02 * energy(error - plain_B @ plain_A, None)


def test_leading_ranks_come_first() -> None:
    error, hessian = rounding_error(64, 96), correlated_hessian(96, decades=2.0)
    B, A = lorc.fit(error, hessian, 8)
    for rank in range(1, 8):
        left = energy(error - B[:, :rank] @ A[:rank], hessian)
        assert left <= least_energy(error, hessian, rank) * 1.02


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
@pytest.mark.parametrize("metric", ["none", "hessian"])
def test_a_full_rank_gives_everything_back(shape: tuple[int, int], metric: str) -> None:
    error = rounding_error(*shape)
    hessian = correlated_hessian(shape[1], decades=2.0) if metric == "hessian" else None
    B, A = lorc.fit(error, hessian, min(shape))
    assert energy(error - B @ A, hessian) < 1e-6 * energy(error, hessian)


@pytest.mark.parametrize("metric", ["none", "hessian"])
def test_an_error_of_low_rank_is_given_back(metric: str) -> None:
    error = normal(50, 3) @ normal(3, 70, seed=1)
    hessian = correlated_hessian(70, decades=2.0) if metric == "hessian" else None
    B, A = lorc.fit(error, hessian, 5)
    assert energy(error - B @ A, hessian) < 1e-6 * energy(error, hessian)


def one_row(rows: int, columns: int) -> Tensor:
    error = torch.zeros(rows, columns)
    error[rows // 3] = normal(columns)
    return error


DEPENDENT = {
    "rank 3": lambda: normal(50, 3) @ normal(3, 70, seed=1),
    "one row": lambda: one_row(50, 70),
    "one column": lambda: one_row(70, 50).t(),
    "one element": lambda: torch.eye(50, 70) * (torch.arange(70) == 7),
    "zeros": lambda: torch.zeros(50, 70),
}


@pytest.fixture
def reflected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what Householder's reflections are asked for."""
    shapes: list[tuple[int, ...]] = []
    real = lorc._householder

    def householder(basis: Tensor, share: Share) -> Tensor:
        shapes.append(tuple(basis.shape))
        return real(basis, share)

    monkeypatch.setattr(lorc, "_householder", householder)
    return shapes


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", DEPENDENT)
@pytest.mark.parametrize("metric", ["none", "hessian"])
def test_columns_that_depend_on_one_another(
    kind: str, metric: str, again: bool, reflected: list[tuple[int, ...]]
) -> None:
    error = DEPENDENT[kind]()
    hessian = correlated_hessian(error.shape[1], decades=2.0) if metric == "hessian" else None
    start = torch.zeros(len(error), 5) if again else None  # as of no error before, at worst
    B, A = lorc.fit(error, hessian, 5, start=start)
    assert reflected
    assert set(reflected) == {(len(error), 13)}
    assert energy(error - B @ A, hessian) <= 1e-6 * energy(error, hessian)
    assert torch.allclose(B.t() @ B, torch.eye(5), atol=1e-4)


@pytest.mark.parametrize("decades", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("spike", [1.0, 1e2, 1e4])  # of one feature, as language models have
def test_a_start_that_was_good_is_good_again(
    decades: float, spike: float, reflected: list[tuple[int, ...]]
) -> None:
    error, hessian = rounding_error(120, 200), correlated_hessian(200, decades=decades)
    hessian[3] *= spike**0.5
    hessian[:, 3] *= spike**0.5
    B, A = lorc.fit(error, hessian, 8)
    assert energy(error - B @ A, hessian) <= least_energy(error, hessian, 8) * (1 + 1e-4)
    other = error + 0.05 * rounding_error(120, 200, seed=9)
    B, A = lorc.fit(other, hessian, 8, start=lorc.encode(B, A, "e4m3").B)
    assert energy(other - B @ A, hessian) <= least_energy(other, hessian, 8) * (1 + 1e-4)
    assert not reflected


def test_orthonormal_by_cholesky() -> None:
    """Once it is so up to the square of the condition; the basis that is used is to the end."""
    left, right = (torch.linalg.qr(normal(*s).double()).Q for s in ((300, 6), (6, 6)))
    basis = ((left * torch.logspace(0, -5.3, 6)) @ right).float()
    share = ALONE.share(300)
    cholesky = lorc._Cholesky(share)
    once = cholesky(basis).double()
    assert 3e-6 < float((once.t() @ once - torch.eye(6)).abs().max()) < 1e-3
    used = lorc._leading(torch.eye(300), None, share, basis, 0, cholesky)[0].double()
    assert float((used.t() @ used - torch.eye(6)).abs().max()) < 3e-7
    assert torch.allclose(used @ (used.t() @ basis.double()), basis.double(), atol=1e-7)
    assert bool(cholesky.held())
    cholesky(torch.cat([basis[:, :5], basis[:, :1]], dim=1))
    assert not bool(cholesky.held())


def test_the_random_basis_is_made_once() -> None:
    device = torch.device("cpu")
    wanted = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    lorc.fit(rounding_error(40, 60), None, 4)
    kept = lorc._random(40, 12, device)
    lorc.fit(rounding_error(40, 60), None, 4, start=normal(40, 4))
    assert lorc._random(40, 12, device) is kept
    assert torch.equal(kept, wanted)


@pytest.mark.parametrize("form", ["e4m3", "bf16"])
@pytest.mark.parametrize("metric", ["none", "hessian", "zero"])
def test_no_error_needs_no_factors(metric: str, form: Form) -> None:
    hessians = {
        "none": None,
        "hessian": correlated_hessian(30, decades=2.0),
        "zero": torch.zeros(30, 30),
    }
    factors = lorc.encode(*lorc.fit(torch.zeros(20, 30), hessians[metric], 4), form)
    assert not factors.product().any()
    product = lorc.encode(*lorc.fit(rounding_error(20, 30), hessians[metric], 4), form).product()
    assert product.isfinite().all()


def test_the_same_input_gives_the_same_factors() -> None:
    error, hessian = rounding_error(40, 60), correlated_hessian(60, decades=2.0)
    first = lorc.fit(error, hessian, 4)
    torch.manual_seed(123)  # the global generator plays no part
    second = lorc.fit(error, hessian, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_arguments_stay_as_they_are() -> None:
    error, hessian = rounding_error(40, 60), correlated_hessian(60, decades=2.0)
    copies = error.clone(), hessian.clone()
    lorc.encode(*lorc.fit(error, hessian, 4), "e4m3")
    assert torch.equal(error, copies[0])
    assert torch.equal(hessian, copies[1])


def test_encoding_costs_little() -> None:
    error, hessian = rounding_error(96, 128), correlated_hessian(128, decades=2.0)
    B, A = lorc.fit(error, hessian, 8)
    exact = energy(error - B @ A, hessian)
    product = energy(B @ A, hessian)
    for form, share in (("e4m3", 2e-3), ("bf16", 2e-5)):
        factors = lorc.encode(B, A, form)  # type: ignore[arg-type]
        assert energy(factors.product() - B @ A, hessian) < share * product
        assert energy(error - factors.product(), hessian) < exact + share * product


def test_forms() -> None:
    B, A = lorc.fit(rounding_error(20, 30), None, 4)
    e4m3, bf16 = lorc.encode(B, A, "e4m3"), lorc.encode(B, A, "bf16")
    assert e4m3.A.dtype == e4m3.B.dtype == torch.float8_e4m3fn
    assert bf16.A.dtype == bf16.B.dtype == torch.bfloat16
    assert (e4m3.A.shape, e4m3.B.shape) == (bf16.A.shape, bf16.B.shape) == ((4, 30), (20, 4))
    assert e4m3.scale is not None
    assert e4m3.scale.dtype == torch.float32
    assert e4m3.scale.shape == (4,)
    assert bf16.scale is None
    assert torch.equal(bf16.A, A.bfloat16())
    assert torch.equal(bf16.B, B.bfloat16())


@pytest.mark.parametrize("form", ["e4m3", "bf16"])
def test_the_product_is_b_times_scale_times_a(form: Form) -> None:
    B, A = normal(20, 4), normal(4, 30, seed=1) * torch.logspace(0, -6, 4)[:, None]
    factors = lorc.encode(B, A, form)
    scale = torch.ones(4) if factors.scale is None else factors.scale
    wanted = factors.B.double() @ torch.diag(scale.double()) @ factors.A.double()
    assert factors.product().dtype == torch.float32
    assert torch.allclose(factors.product().double(), wanted, rtol=1e-5, atol=1e-6)


def test_each_rank_has_its_scale() -> None:
    """Ranks of very different sizes lose no range."""
    B, A = normal(20, 3), normal(3, 30, seed=1)
    sizes = torch.tensor([1.0, 1e-9, 1e9])
    for r, factors in enumerate(
        lorc.encode(B[:, [r]] * sizes[r], A[[r]] / 7, "e4m3") for r in range(3)
    ):
        together = lorc.encode(B * sizes, A / 7, "e4m3")
        assert factors.scale is not None
        assert together.scale is not None
        assert together.scale[r] == factors.scale[0]
        assert torch.equal(together.A[r].float(), factors.A[0].float())
        assert torch.equal(together.B[:, r].float(), factors.B[:, 0].float())


def test_factors_that_are_e4m3_already_stay_exact() -> None:
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # to 448
    generator = torch.Generator().manual_seed(0)
    A = numbers[torch.randint(0x7F, (3, 40), generator=generator)]
    B = numbers[torch.randint(0x7F, (20, 3), generator=generator)]
    A[:, 7], B[5] = 448.0, -448.0
    factors = lorc.encode(B * 2.0**-9, A * torch.tensor([[1.0], [0.125], [4.0]]), "e4m3")
    assert torch.equal(factors.A.float(), A)
    assert torch.equal(factors.B.float(), B)
    assert factors.scale is not None
    assert factors.scale.tolist() == [2.0**-9, 2.0**-12, 2.0**-7]
    again = lorc.encode(factors.B.float(), factors.A.float() * factors.scale[:, None], "e4m3")
    assert torch.equal(again.product(), factors.product())
