"""Codebooks: rounding against brute force, exactness under every shift, the choice by group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from zqfp_convert.numerics import bits, codebook, e2m1, fp8, scales
from zqfp_convert.numerics.codebook import E2M1, PAIR, Codebook

BOOKS: tuple[Codebook, ...] = (E2M1, *PAIR)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("book", BOOKS)
def test_every_shift_is_exact(book: Codebook) -> None:
    """Normal E4M3 numbers, so that a step of the exponent adds 8 to each byte but that of 0."""
    assert codebook.admissible(book)
    assert len(codebook.MAGNITUDES) == 31
    shifts = torch.arange(-5, 7)
    values = torch.tensor(book) * torch.exp2(shifts)[:, None]
    codes = fp8.encode(values)
    assert torch.equal(fp8.decode(codes), values)
    steps = codes.view(torch.uint8).int()[:, 1:].diff(dim=0)
    assert bool((steps == 8).all())


@pytest.mark.parametrize(
    "book",
    [
        (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0),
        (0.0, 0.25, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
        (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0),
        (0.0, 0.5, 1.0, 1.0, 2.0, 3.0, 4.0, 6.0),
        (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.1),
        (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
        (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, float("nan")),
        (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.5000001),
        (0, 1, 2, 3, 4, 5, 6, 10**400),
    ],
)
def test_what_is_no_codebook(book: Codebook) -> None:
    assert not codebook.admissible(book)


@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_nearest(book: Codebook, dtype: torch.dtype) -> None:
    values = (4 * normal(4000)).to(dtype)
    have = codebook.round_to(values, book)
    assert have.dtype == dtype
    every = np.concatenate([-np.array(book), np.array(book)])
    given = values.double().numpy()
    distance = np.abs(every - given[:, None]).min(1)
    assert np.array_equal(np.abs(have.double().numpy() - given), distance)
    codes = codebook.encode(values, book)
    assert not bool((codes == 8).any())
    assert torch.equal(codebook.decode(codes, book), have.float() + 0.0)
    everything = torch.arange(16, dtype=torch.uint8)
    spelled = codebook.encode(codebook.decode(everything, book), book)
    assert torch.equal(spelled, everything.where(everything != 8, torch.zeros_like(everything)))


@pytest.mark.parametrize("book", BOOKS)
def test_every_place_where_rounding_turns(book: Codebook) -> None:
    points = torch.arange(-8 * 64, 8 * 64 + 1) / 64  # all halves of sums of magnitudes among them
    up, down = torch.full_like(points, 9.0), torch.full_like(points, -9.0)
    beside = [torch.nextafter(points, up), torch.nextafter(points, down)]
    values = torch.cat([points, *beside])
    ties = [code % 2 if book == E2M1 else code for code in range(8)]
    want = []
    for value in values.double().abs().tolist():
        want.append(min(range(8), key=lambda code: (abs(book[code] - value), ties[code])))
    magnitudes = torch.tensor(book)[want]
    assert torch.equal(codebook.round_to(values, book), magnitudes.copysign(values))
    codes = torch.tensor(want, dtype=torch.uint8)
    negative = (values < 0) & (codes > 0)
    assert torch.equal(codebook.encode(values, book), codes + 8 * negative)


def test_the_second_of_two_where_so_marked() -> None:
    values, second = 4 * normal(64, 40), normal(64, 40) > 0
    first, other = codebook.PAIR
    both = torch.where(second, codebook.round_to(values, other), codebook.round_to(values, first))
    assert torch.equal(codebook.round_to(values, *codebook.PAIR, second=second), both)
    codes = codebook.encode(values, *codebook.PAIR, second=second)
    decoded = codebook.decode(codes, *codebook.PAIR, second=second)
    assert torch.equal(decoded, both + 0.0)


def test_signs_and_nan_stay() -> None:
    values = torch.tensor([-0.0, 0.0, -1e-30, float("nan"), -1e30])
    for book in BOOKS:
        have = codebook.round_to(values, book)
        assert torch.equal(torch.signbit(have[:3]), torch.tensor([True, False, True]))
        assert have[3].isnan()
        assert have[4] == -book[-1]


def test_e2m1_is_one_of_them() -> None:
    values = torch.linspace(-7, 7, 4001)
    assert torch.equal(codebook.round_to(values, E2M1), e2m1.round_to_grid(values))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 64])
def test_a_bit_for_each_group(rows: int) -> None:
    flags = normal(rows, 5) > 0
    packed = bits.pack(flags)
    assert packed.shape == (-(-rows // 8), 5)
    assert torch.equal(bits.unpack(packed, rows), flags)
    spelled = [sum(int(flag) << n % 8 for n, flag in enumerate(g) if n < 8) for g in flags.t()]
    assert packed[0].tolist() == spelled


@pytest.mark.parametrize("kind", ["m1", "m2"])
def test_each_group_has_the_better_codebook(kind: scales.Kind) -> None:
    weight = normal(24, 300)
    both = scales.choose(weight, kind, "search", 64, books=PAIR)
    assert both.choice is not None
    assert both.choice.shape == both.exponent.shape
    assert 0 < both.choice.float().mean() < 1
    errors = []
    for books in (PAIR, PAIR[:1], PAIR[1:], (E2M1,)):
        chosen = scales.choose(weight, kind, "search", 64, books=books)
        codes = scales.quantize(weight, chosen)
        assert chosen.span is not None
        assert chosen.span <= scales.MAX_SPAN
        errors.append(float((weight - scales.dequantize(codes, chosen)).square().sum()))
    assert errors[0] < min(errors[1:])
    columns = torch.arange(300)
    rounded = both.round(weight, both.marks(columns))
    codes = scales.quantize(weight, both)
    assert torch.equal(rounded, scales.dequantize(codes, both))


def test_gains_on_random_weights() -> None:
    """What the pair is for; the numbers are those beside it."""
    torch.manual_seed(0)
    student = torch.distributions.StudentT
    for weight, at_most in (
        (normal(64, 1024), 0.84),
        (student(10.0).sample((64, 1024)), 0.88),
        (student(5.0).sample((64, 1024)), 0.93),
    ):
        error = {}
        for books in (PAIR, (E2M1,)):
            chosen = scales.choose(weight, "m2", "search", 128, books=books)
            left = weight - scales.dequantize(scales.quantize(weight, chosen), chosen)
            error[len(books)] = float(left.square().sum())
        assert error[2] < at_most * error[1]


def test_groups_of_zeros_have_the_first() -> None:
    weight = normal(4, 256)
    weight[1, 64:128] = 0
    weight[2] = 0
    chosen = scales.choose(weight, "m2", "search", 64, books=PAIR)
    assert chosen.choice is not None
    marked = scales.Scales(
        chosen.kind,
        chosen.factor,
        chosen.exponent,
        64,
        books=PAIR,
        choice=torch.ones_like(chosen.choice),
    )
    kept = scales.canonical(scales.quantize(weight, marked), marked).choice
    assert kept is not None
    assert not kept[2].any()
    assert kept[1].tolist() == [True, False, True, True]
