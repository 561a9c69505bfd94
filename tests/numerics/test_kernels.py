"""The Triton kernels of numerics, in the interpreter or on a GPU, against plain torch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from zqfp_convert.numerics import codebook, fp8, kernels, scales

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOOKS = [(codebook.E2M1,), codebook.PAIR, (codebook.PAIR[1],)]


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the functions of numerics do without kernels."""
    monkeypatch.setattr(kernels, "take", lambda tensor: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extents", [(3, 40), (2, 5, 130), (4, 1), (0, 7)])
def test_simulated_activations_are_the_same_bits(
    dtype: torch.dtype, extents: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from zqfp_convert.numerics.kernels.simulate import simulate

    plain(monkeypatch)
    values = (torch.randn(extents) * torch.exp(3 * torch.randn(extents))).to(DEVICE, dtype)
    if len(values) > 2:
        values[1] = 0
        values[2, ..., 0] = 1e4
    assert torch.equal(simulate(values), fp8.simulate(values))


def test_simulated_activations_of_a_view_and_nan() -> None:
    from zqfp_convert.numerics.kernels.simulate import simulate

    values = torch.randn(70, 6, device=DEVICE).t()
    assert torch.equal(simulate(values), simulate(values.contiguous()))
    values = values.contiguous()
    values[2, 3] = float("nan")
    assert simulate(values)[2].isnan().all()
    assert simulate(values)[3].isfinite().all()


@pytest.mark.parametrize("books", BOOKS)
@pytest.mark.parametrize(("group_size", "columns"), [(32, 96), (32, 80), (128, 130), (70, 70)])
@pytest.mark.parametrize("weighted", ["", "vector", "diagonal"])
def test_searched_scales_are_the_same(
    books: tuple[codebook.Codebook, ...],
    group_size: int,
    columns: int,
    weighted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.randn(9, columns, device=DEVICE) * torch.exp(torch.randn(9, 1, device=DEVICE))
    weight[3] = 0
    weight[4, :32] = 0
    weight[5] *= 2.0**-110
    hessian = torch.rand(columns, columns, device=DEVICE)
    importance = hessian.diagonal() if weighted == "diagonal" else hessian[0]
    importance = importance if weighted else None
    plain(monkeypatch)
    wanted = scales.choose(weight, "m2", "search", group_size, importance, books)
    monkeypatch.setattr(kernels, "take", lambda tensor: True)
    found = scales.choose(weight, "m2", "search", group_size, importance, books)
    assert torch.equal(found.factor, wanted.factor)
    assert torch.equal(found.exponent, wanted.exponent)
    assert (found.choice is None) == (wanted.choice is None)
    if wanted.choice is not None:
        assert torch.equal(found.choice, wanted.choice)
        assert 0 < wanted.choice.float().mean() < 1


@pytest.mark.parametrize("books", BOOKS)
def test_bounds_round_as_the_codebook_does(books: tuple[codebook.Codebook, ...]) -> None:
    from zqfp_convert.numerics.kernels.books import bounds

    middles = [(low + high) / 2 for book in books for low, high in pairwise(book)]
    values = torch.tensor([v for m in middles for v in (m, m * (1 - 1e-7), m * (1 + 2e-7), 9.0)])
    above, rises = (torch.tensor(part).view(2, 7) for part in bounds(books))
    for book, limits, steps in zip((books[0], books[-1]), above, rises, strict=True):
        found = ((values[:, None] > limits) * steps).sum(1)
        assert torch.equal(found, codebook.round_to(values, book))
