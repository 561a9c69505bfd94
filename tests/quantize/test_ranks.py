"""What rank is worth its bits: against float64, and against a count in decibels."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from problems import correlated_hessian, normal
from torch import Tensor

from zqfp_convert.quantize import lorc, ranks

Form = Literal["e4m3", "bf16"]
RANKS = range(0, 40, 8)


def energy(error: Tensor, hessian: Tensor | None) -> float:
    E = error.double()
    return float((E * E).sum() if hessian is None else ((E @ hessian.double()) * E).sum())


def squares(error: Tensor, hessian: Tensor | None) -> Tensor:
    """Eigenvalues of `E H E^T` in float64, the largest first."""
    E = error.double()
    gram = E @ E.t() if hessian is None else E @ hessian.double() @ E.t()
    return torch.linalg.eigvalsh(gram).flip(0)


def spread(rows: int, columns: int, seed: int = 0) -> Tensor:
    """White noise under rows and columns of different sizes."""
    sizes = torch.exp(0.5 * normal(rows, 1, seed=seed + 1) + 0.5 * normal(columns, seed=seed + 2))
    return normal(rows, columns, seed=seed) * sizes


@pytest.mark.parametrize("form", ["e4m3", "bf16"])
@pytest.mark.parametrize("metric", ["none", "hessian"])
def test_energies_are_those_of_the_factors_on_disk(metric: str, form: Form) -> None:
    error = spread(96, 160)
    hessian = correlated_hessian(160, decades=2.0) if metric == "hessian" else None
    factors = lorc.encode(*lorc.fit(error, hessian, 32), form)
    scale = torch.ones(32) if factors.scale is None else factors.scale
    B, A = factors.B.double(), factors.A.double() * scale.double()[:, None]
    wanted = [energy(error - B[:, :r] @ A[:r], hessian) for r in RANKS]
    assert ranks.energies_left(error, hessian, RANKS, form) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("metric", ["none", "hessian"])
@pytest.mark.parametrize("error", [normal(256, 384), spread(256, 384)], ids=["white", "spread"])
def test_the_last_ranks_are_found_too(error: Tensor, metric: str) -> None:
    """What each 8 ranks give back, nearly as much as the eigenvectors would."""
    hessian = correlated_hessian(384, decades=2.0) if metric == "hessian" else None
    left = ranks.energies_left(error, hessian, RANKS, "bf16")
    best = squares(error, hessian)
    assert left[0] == pytest.approx(float(best.sum()), rel=1e-5)
    for i, r in enumerate(RANKS[:-1]):
        wanted = float(best[r : r + 8].sum())
        assert 0.9 * wanted < left[i] - left[i + 1] < 1.01 * wanted


SIDE = 4096


def in_decibels(squares: list[float], form: Form) -> int:
    """The rank for a layer [4096, 4096] that ends up lowest, with 6.02 dB for each bit it costs."""

    def level(rank: int) -> float:
        a_rank = 2 * SIDE * (8 if form == "e4m3" else 16) + (32 if form == "e4m3" else 0)
        bits = rank * a_rank / SIDE**2
        return 10 * math.log10(math.fsum(squares[rank:])) + 20 * math.log10(2) * bits

    levels = {rank: level(rank) for rank in RANKS}
    return min(levels, key=levels.__getitem__)


@pytest.mark.parametrize(
    ("strong", "share", "form", "rank"),
    [
        (1, 1 / SIDE, "e4m3", 0),  # flat
        (20, 0.09, "e4m3", 0),  # 8 of them are .036 of the energy, and would have to be .042
        (20, 0.14, "e4m3", 16),  # the last 4 are not worth 8 ranks
        (20, 0.30, "e4m3", 24),
        (20, 0.14, "bf16", 0),
        (20, 0.30, "bf16", 16),
        (64, 0.60, "e4m3", 32),
    ],
)
def test_a_large_layer_gets_what_theory_says(
    strong: int, share: float, form: Form, rank: int
) -> None:
    squares = [share / strong] * strong + [(1 - share) / (SIDE - strong)] * (SIDE - strong)
    assert in_decibels(squares, form) == rank
    order = torch.randperm(SIDE, generator=torch.Generator().manual_seed(0))
    error = torch.zeros(SIDE, SIDE)
    error[torch.arange(SIDE), order] = torch.tensor(squares).sqrt()
    assert ranks.worthwhile([(error, 10 * error)], None, form) == rank


@pytest.mark.parametrize("shape", [(64, 64), (256, 384), (1024, 256)])
def test_white_errors_are_worth_nothing(shape: tuple[int, int]) -> None:
    assert ranks.worthwhile([(normal(*shape), normal(*shape, seed=1))], None, "e4m3") == 0


def low(rows: int, columns: int, rank: int, noise: float, seed: int = 0) -> Tensor:
    """An error of that rank, and white noise of so much of its energy."""
    strong = normal(rows, rank, seed=seed) @ normal(rank, columns, seed=seed + 1)
    return strong / rank**0.5 + noise**0.5 * normal(rows, columns, seed=seed + 2)


@pytest.mark.parametrize(("rank", "found"), [(3, 8), (8, 8), (9, 16), (24, 24)])
def test_a_low_rank_gets_the_next_multiple_of_eight(rank: int, found: int) -> None:
    layer = low(512, 512, rank, 1e-3), normal(512, 512, seed=9)
    assert ranks.worthwhile([layer], None, "e4m3") == found


def test_the_metric_decides() -> None:
    """An error that is white, of which the outputs feel four directions."""
    error, weight = normal(256, 256), normal(256, 256, seed=1)
    hessian = torch.eye(256)
    hessian[:4, :4] *= 1e4
    assert ranks.worthwhile([(error, weight)], None, "e4m3") == 0
    assert ranks.worthwhile([(error, weight)], hessian, "e4m3") == 8


def test_layers_of_one_input_share_their_gain_and_its_price() -> None:
    strong, white = low(512, 512, 8, 1e-3), normal(512, 512, seed=5)
    weight = normal(512, 512, seed=9)
    assert ranks.worthwhile([(strong, weight)], None, "e4m3") == 8
    assert ranks.worthwhile([(white, weight)], None, "e4m3") == 0
    # Half of both's energy, which is more than the quarter of a bit that 8 ranks cost of each.
    assert ranks.worthwhile([(strong, weight), (white, weight)], None, "e4m3") == 8
    assert ranks.worthwhile([(0.3 * strong, weight), (white, weight)], None, "e4m3") == 0


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("size", [1.0, 0.3])
def test_the_size_of_a_layer_does_not_count(factor: float, size: float) -> None:
    """A model may have any of its layers larger and another smaller for it."""
    strong, white = size * low(512, 512, 8, 1e-3), normal(512, 512, seed=5)
    weight = normal(512, 512, seed=9)
    layers = [(factor * strong, factor * weight), (white, weight)]
    assert ranks.worthwhile(layers, None, "e4m3") == (8 if size == 1 else 0)


@pytest.mark.parametrize("form", ["e4m3", "bf16"])
def test_the_whole_matrix_again_is_worth_nothing(form: Form) -> None:
    """Full rank leaves no error but that of the factors, for more bits than the codes have."""
    assert ranks.worthwhile([(normal(24, 64), normal(24, 64, seed=1))], None, form) == 0


def test_no_error_and_no_weight() -> None:
    nothing, weight = torch.zeros(20, 30), normal(20, 30)
    assert ranks.worthwhile([(nothing, weight)], None, "e4m3") == 0
    assert ranks.worthwhile([(nothing, nothing)], torch.zeros(30, 30), "e4m3") == 0
