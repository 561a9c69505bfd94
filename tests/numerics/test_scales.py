"""Scales: what each rounding promises, the rules of the format, search against brute force."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zqfp_convert.numerics import scales
from zqfp_convert.numerics.scales import Kind, Rounding, Scales

ROUNDINGS: tuple[Rounding, ...] = ("ceil", "floor", "nearest", "search")
CHOICES: list[tuple[Kind, Rounding]] = [
    ("free", "nearest"),
    ("free", "search"),
    *(("m1", rounding) for rounding in ROUNDINGS),
    *(("m2", rounding) for rounding in ROUNDINGS),
]
NEVER_CLIP: list[tuple[Kind, Rounding]] = [("m1", "ceil"), ("m2", "floor")]
GROUP_SIZES = (32, 64, 128, 256, 300)  # 300: a row
COLUMNS = 300  # leaves a shorter last group with all of them but the last
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
MIDDLE = (VALUES[1:] + VALUES[:-1]) / 2


def on_grid(values: np.ndarray) -> np.ndarray:
    """The nearest E2M1 values, ties to even, in float64."""
    low, high = (np.searchsorted(MIDDLE, np.abs(values), side) for side in ("left", "right"))
    return np.sign(values) * VALUES[np.where(low % 2 == 0, low, high)]


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Tensor:
    drawn = np.random.default_rng(seed).standard_t(4, (rows, columns))
    return torch.from_numpy(drawn).float()


def awkward() -> Tensor:
    """Rows of every kind that a model can have, and some that none should."""
    weight = normal(14, COLUMNS)
    weight[1] = 0.0
    weight[2, 32:300] = 0.0
    weight[3, :256] = 0.0
    weight[4] *= 1e-38
    weight[5] *= 1e-30
    weight[6] *= 1e30
    weight[7] *= torch.logspace(-30, 0, COLUMNS)
    weight[8] *= torch.logspace(30, -38, COLUMNS)
    weight[9] = 1e-45
    weight[10, ::2] = 0.0
    weight[11] = weight[11].bfloat16().float()
    weight[12] = 0.0
    weight[12, 299] = -1e-3
    weight[13, :128] *= 2.0**-14
    return weight


def grouped(values: Tensor, group_size: int) -> list[Tensor]:
    return list(values.split(group_size, dim=1))


def absmax_of(weight: Tensor, group_size: int) -> Tensor:
    """Float64 `[N, G]`."""
    return torch.stack([part.abs().amax(1) for part in grouped(weight, group_size)], 1).double()


def costs(weight: Tensor, chosen: Scales, importance: Tensor) -> Tensor:
    """Weighted squared error of each group, float64 `[N, G]`."""
    quantized = scales.dequantize(scales.quantize(weight, chosen), chosen)
    squares = (weight.double() - quantized.double()).square() * importance.double()
    return torch.stack([part.sum(1) for part in grouped(squares, chosen.group_size)], 1)


def is_bfloat16(values: Tensor) -> bool:
    return torch.equal(values, values.bfloat16().float())


# What holds for every choice.


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("kind", "rounding"), CHOICES)
def test_rules_of_the_format(kind: Kind, rounding: Rounding, group_size: int) -> None:
    weight = awkward()
    before = weight.clone()
    chosen = scales.choose(weight, kind, rounding, group_size)
    assert torch.equal(weight, before)
    groups = -(-COLUMNS // group_size)
    assert (chosen.kind, chosen.group_size) == (kind, group_size)
    assert chosen.factor.shape == (14, groups if kind == "free" else 1)
    assert chosen.exponent.shape == (14, groups)
    assert chosen.factor.dtype == torch.float32
    assert chosen.exponent.dtype == torch.int16
    assert is_bfloat16(chosen.factor)
    assert chosen.factor.isfinite().all()
    assert (chosen.factor > 0).all()
    assert (chosen.factor >= 2.0**-100).all()  # normal numbers, products too
    zero_group = absmax_of(weight, group_size) == 0
    zero_row = zero_group.all(1)
    if kind == "free":
        assert chosen.span is None
        assert chosen.raised == 0
        assert not chosen.exponent.any()
        assert (chosen.factor[zero_group] == 1).all()
        return
    largest = chosen.exponent.amax(1)
    assert chosen.span == int((largest - chosen.exponent.amin(1)).max()) <= 11
    assert ((chosen.exponent >= -127) & (chosen.exponent <= 127)).all()  # E8M0
    assert (chosen.exponent == largest[:, None])[zero_group].all()
    assert (chosen.factor[zero_row] == 1).all()
    assert (chosen.exponent[zero_row] == 0).all()
    if kind == "m1":
        assert (chosen.factor == 1).all()
    else:
        assert (largest == 0).all()


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("kind", "rounding"), CHOICES)
def test_quantizing_takes_the_nearest_value_of_the_scale(
    kind: Kind, rounding: Rounding, group_size: int
) -> None:
    weight = awkward()
    chosen = scales.choose(weight, kind, rounding, group_size)
    codes = scales.quantize(weight, chosen)
    quantized = scales.dequantize(codes, chosen)
    assert codes.dtype == torch.uint8
    assert codes.shape == quantized.shape == weight.shape
    assert codes.max() < 16
    assert not (codes == 8).any()
    columns = torch.arange(COLUMNS)
    scale = chosen.per_group().repeat_interleave(group_size, 1)[:, :COLUMNS]
    assert torch.equal(chosen.per_column(columns), scale)
    assert torch.equal(chosen.per_column(columns[[7, 299, 0]]), scale[:, [7, 299, 0]])
    wanted = on_grid((weight / scale).double().numpy()) * scale.double().numpy()
    assert (quantized.double().numpy() == wanted).all()
    # What is quantized stays, bit by bit.
    assert torch.equal(scales.quantize(quantized, chosen), codes)


@pytest.mark.parametrize(("kind", "rounding"), CHOICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, kind: Kind, rounding: Rounding) -> None:
    weight = normal(4, 96).to(dtype)
    chosen = scales.choose(weight, kind, rounding, 32)
    same = scales.choose(weight.float(), kind, rounding, 32)
    assert torch.equal(chosen.per_group(), same.per_group())
    assert chosen.per_group().dtype == torch.float32


@pytest.mark.parametrize(("kind", "rounding"), CHOICES)
@pytest.mark.parametrize("columns", [64, 70])
def test_views_are_scaled_like_copies(kind: Kind, rounding: Rounding, columns: int) -> None:
    view = normal(columns, 8).t()
    chosen = scales.choose(view, kind, rounding, 32)
    same = scales.choose(view.contiguous(), kind, rounding, 32)
    assert torch.equal(chosen.per_group(), same.per_group())
    assert torch.equal(scales.quantize(view, chosen), scales.quantize(view.contiguous(), same))


@pytest.mark.parametrize(("kind", "rounding"), CHOICES)
def test_rows_do_not_see_each_other(kind: Kind, rounding: Rounding) -> None:
    weight = awkward()
    whole = scales.choose(weight, kind, rounding, 64)
    alone = [scales.choose(row[None], kind, rounding, 64) for row in weight]
    assert torch.equal(whole.per_group(), torch.cat([row.per_group() for row in alone]))
    assert whole.raised == sum(row.raised for row in alone)


@pytest.mark.parametrize(("kind", "rounding"), CHOICES)
def test_the_padding_of_a_short_last_group_does_not_count(kind: Kind, rounding: Rounding) -> None:
    weight = normal(5, 70)
    importance = torch.rand(70, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(weight, (0, 26))
    weights = torch.nn.functional.pad(importance, (0, 26), value=9.0)
    short = scales.choose(weight, kind, rounding, 32, importance)
    full = scales.choose(padded, kind, rounding, 32, weights)
    assert torch.equal(short.per_group(), full.per_group())


@pytest.mark.parametrize(("kind", "rounding"), CHOICES)
@pytest.mark.parametrize("largest", [2e38, 3.4e38])
def test_nothing_overflows(kind: Kind, rounding: Rounding, largest: float) -> None:
    weight = normal(3, 64)
    weight *= largest / weight.abs().max()
    chosen = scales.choose(weight, kind, rounding, 32)
    assert scales.dequantize(scales.quantize(weight, chosen), chosen).isfinite().all()


# The roundings.


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(2.0**-40, 2.0**40, width=32), min_size=1, max_size=4))
def test_roundings_that_never_clip(absmax: list[float]) -> None:
    weight = torch.tensor([[value * sign for value in absmax for sign in (-1, 0.5)]])
    for kind, rounding in NEVER_CLIP:
        chosen = scales.choose(weight, kind, rounding, 2)
        for value, scale in zip(absmax, chosen.per_group()[0].tolist(), strict=True):
            assert Fraction(value) <= 6 * Fraction(scale)


@pytest.mark.parametrize(("kind", "rounding"), NEVER_CLIP)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_never_clips(kind: Kind, rounding: Rounding, group_size: int) -> None:
    weight = awkward()
    chosen = scales.choose(weight, kind, rounding, group_size)
    assert (absmax_of(weight, group_size) <= 6 * chosen.per_group().double()).all()


@pytest.mark.parametrize(("kind", "rounding"), [("m1", "floor"), ("m2", "ceil")])
def test_roundings_that_clip(kind: Kind, rounding: Rounding) -> None:
    weight = normal(8, 256)
    chosen = scales.choose(weight, kind, rounding, 32)
    steps = absmax_of(weight, 32) / chosen.per_group().double()
    assert (steps >= 6 * (1 - 2.0**-8)).all()  # a bfloat16 row scale may be half a step too large
    assert (steps > 6.5).float().mean() > 0.5


@pytest.mark.parametrize("power", range(-60, 60, 7))
@pytest.mark.parametrize("beside", [-1, 0, 1])
def test_m1_around_a_power_of_two(power: int, beside: int) -> None:
    """At and beside `absmax = 6 * 2^power` the roundings differ; just there they must not."""
    absmax = torch.tensor([[6.0 * 2.0**power]])
    if beside:
        absmax = torch.nextafter(absmax, torch.tensor(math.inf * beside))
    exponents = {
        rounding: scales.choose(absmax, "m1", rounding, 32).exponent.item()
        for rounding in ("ceil", "floor", "nearest")
    }
    assert exponents == {
        "ceil": power + (beside > 0),
        "floor": power - (beside < 0),
        "nearest": power,
    }


def test_m1_exponents() -> None:
    weight = normal(20, 256)
    logarithm = torch.log2(absmax_of(weight, 32) / 6)
    for rounding, wanted in (
        ("ceil", logarithm.ceil()),
        ("floor", logarithm.floor()),
        ("nearest", logarithm.round()),
    ):
        assert torch.equal(scales.choose(weight, "m1", rounding, 32).exponent.double(), wanted)


@pytest.mark.parametrize("rounding", ["ceil", "floor", "nearest"])
def test_m2_exponents_and_row_scale(rounding: Rounding) -> None:
    weight = normal(20, 256) * torch.logspace(0, -2, 256)
    ideal = absmax_of(weight, 32) / 6
    largest = ideal.amax(1, keepdim=True)
    ratio = torch.log2(largest / ideal)
    wanted = {"ceil": ratio.ceil(), "floor": ratio.floor(), "nearest": ratio.round()}[rounding]
    chosen = scales.choose(weight, "m2", rounding, 32)
    assert torch.equal(chosen.exponent.double(), -wanted)
    assert wanted.max() >= 6
    if rounding == "floor":  # the smallest bfloat16 number not below
        below = torch.nextafter(chosen.factor.bfloat16(), torch.tensor(0.0).bfloat16())
        assert (chosen.factor >= largest).all()
        assert (below < largest).all()
    else:
        assert torch.equal(chosen.factor, largest.float().bfloat16().float())


@pytest.mark.parametrize("rounding", ["ceil", "floor", "nearest"])
@pytest.mark.parametrize("power", [0, 1, 5, 11])
def test_m2_is_exact_at_powers_of_two(rounding: Rounding, power: int) -> None:
    row_scale = 1.5 * 2.0**-7
    weight = torch.tensor([[row_scale * 6, 0.0, row_scale * 6 / 2**power, 0.0]])
    chosen = scales.choose(weight, "m2", rounding, 2)
    assert chosen.factor.item() == row_scale
    assert chosen.exponent.tolist() == [[0, -power]]
    assert chosen.raised == 0
    assert torch.equal(scales.dequantize(scales.quantize(weight, chosen), chosen), weight)


@pytest.mark.parametrize(("kind", "rounding"), CHOICES)
def test_what_is_on_a_grid_stays_exact(kind: Kind, rounding: Rounding) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(VALUES).float()[torch.randint(8, (6, 128), generator=generator)]
    values[:, ::32] = 6.0
    powers = torch.randint(-5, 1, (6, 4), generator=generator)
    powers[:, 0] = 0
    weight = values * torch.exp2(powers.float()).repeat_interleave(32, 1)
    chosen = scales.choose(weight, kind, rounding, 32)
    assert torch.equal(scales.dequantize(scales.quantize(weight, chosen), chosen), weight)


def test_free_nearest_is_the_nearest_bfloat16() -> None:
    weight = normal(9, COLUMNS)
    chosen = scales.choose(weight, "free", "nearest", 64)
    wanted = (absmax_of(weight, 64) / 6).float().bfloat16().float()
    assert torch.equal(chosen.per_group(), wanted)


# The span.


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", ["m1", "m2"])
@pytest.mark.parametrize("power", [10, 11, 12, 13, 40, 90])
def test_groups_below_the_span_are_raised_and_counted(
    kind: Kind, rounding: Rounding, power: int
) -> None:
    large, small = 6.0, 6.0 * 2.0**-power
    weight = torch.tensor([[large, large, small, small], [1.0, 1.0, 1.0, 1.0]])
    chosen = scales.choose(weight, kind, rounding, 2)
    assert chosen.raised == (power > 11)
    assert chosen.span == min(power, 11)
    assert chosen.exponent[0].tolist() == [0, -min(power, 11)]
    # Encoded again under its larger scale.
    wanted = on_grid(np.array(6.0 * 2.0 ** (11 - power))).item() if power > 11 else 6.0
    quantized = scales.dequantize(scales.quantize(weight, chosen), chosen)
    assert quantized[0].tolist() == [large, large] + [wanted * chosen.per_group()[0, 1].item()] * 2


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", ["m1", "m2"])
def test_zero_groups_are_not_raised(kind: Kind, rounding: Rounding) -> None:
    weight = torch.tensor([[6.0, 6.0, 0.0, 0.0, 3.0, 3.0], [0.0] * 6])
    chosen = scales.choose(weight, kind, rounding, 2)
    assert chosen.raised == 0
    assert chosen.exponent.tolist() == [[0, 0, -1], [0, 0, 0]]


@pytest.mark.parametrize("rounding", ["ceil", "floor", "nearest"])
@pytest.mark.parametrize("kind", ["m1", "m2"])
def test_raised_groups_are_counted(kind: Kind, rounding: Rounding) -> None:
    weight = normal(30, 1024) * torch.logspace(0, -5, 1024)
    ideal = absmax_of(weight, 64) / 6
    logarithm = torch.log2(ideal if kind == "m1" else ideal.amax(1, keepdim=True) / ideal)
    rounded = {"ceil": logarithm.ceil(), "floor": logarithm.floor(), "nearest": logarithm.round()}[
        rounding
    ]
    exponent = rounded if kind == "m1" else -rounded
    limit = exponent.amax(1, keepdim=True) - 11
    chosen = scales.choose(weight, kind, rounding, 64)
    assert chosen.raised == int((exponent < limit).sum()) > 30
    assert torch.equal(chosen.exponent.double(), torch.maximum(exponent, limit))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", ["m1", "m2"])
@pytest.mark.parametrize("tiny", [1e-38, 1e-45])
@pytest.mark.parametrize("largest", [1e30, 1e-4])
def test_a_group_next_to_nothing_changes_nothing_for_the_others(
    kind: Kind, rounding: Rounding, tiny: float, largest: float
) -> None:
    groups = [normal(1, 32) * largest, normal(1, 32) * largest * 0.3]
    alone = scales.choose(torch.cat(groups, 1), kind, rounding, 32)
    chosen = scales.choose(torch.cat([*groups, torch.full((1, 32), tiny)], 1), kind, rounding, 32)
    assert torch.equal(chosen.factor, alone.factor)
    assert torch.equal(chosen.exponent[:, :2], alone.exponent)
    assert chosen.exponent[0, 2] <= alone.exponent.max()


# The search.


def brute_force(
    weight: np.ndarray, kind: Kind, group_size: int, importance: np.ndarray
) -> np.ndarray:
    """The least weighted squared error, `[N]`, over the mantissas and two exponents a group."""
    mantissas = [1.0] if kind == "m1" else [2.0 ** (i / 16) for i in range(16)]
    mantissas = torch.tensor(mantissas).bfloat16().double().tolist()
    least = np.zeros(len(weight))
    for n, row in enumerate(weight):
        cost = np.zeros((len(mantissas), -(-len(row) // group_size)))
        for i, mantissa in enumerate(mantissas):
            for g in range(cost.shape[1]):
                part = row[g * group_size : (g + 1) * group_size]
                weights = importance[g * group_size : (g + 1) * group_size]
                lowest = math.floor(math.log2(np.abs(part).max() / mantissa)) - 2
                cost[i, g] = min(
                    np.sum(weights * (part - on_grid(part / scale) * scale) ** 2)
                    for scale in (mantissa * 2.0**lowest, mantissa * 2.0 ** (lowest + 1))
                )
        least[n] = cost.min(0).sum() if kind == "free" else cost.sum(1).min()
    return least


def importances(columns: int, seed: int) -> Tensor:
    """Of very different sizes, some of them zero."""
    drawn = np.random.default_rng(seed).standard_normal(columns)
    return torch.from_numpy(np.where(drawn < -1.3, 0.0, np.exp(2 * drawn))).float()


@pytest.mark.parametrize("kind", ["free", "m1", "m2"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("columns", "group_size"), [(64, 16), (70, 32), (48, 48)])
def test_search_is_as_good_as_brute_force(
    kind: Kind, weighted: bool, columns: int, group_size: int
) -> None:
    weight = torch.cat([normal(12, columns, seed=2), heavy_tailed(12, columns, seed=3)])
    importance = importances(columns, 4) if weighted else torch.ones(columns)
    chosen = scales.choose(weight, kind, "search", group_size, importance)
    assert chosen.raised == 0
    if kind == "m2":
        fraction = torch.frexp(chosen.factor).mantissa * 2
        admitted = torch.tensor([2.0 ** (i / 16) for i in range(16)]).bfloat16().float()
        assert torch.isin(fraction, admitted).all()
    least = brute_force(weight.double().numpy(), kind, group_size, importance.double().numpy())
    have = costs(weight, chosen, importance).sum(1).numpy()
    # Free scales lose a little where they are rounded to bfloat16; mantissas are bfloat16 already.
    assert (have <= least * (1 + 1e-5)).all()


@pytest.mark.parametrize("rounding", ["ceil"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_m1_search_is_never_worse_for_any_group(rounding: Rounding, group_size: int) -> None:
    """`floor` reaches one exponent lower, where most of a group's largest weights are clipped."""
    weight, importance = heavy_tailed(64, 512), importances(512, 1)
    searched = scales.choose(weight, "m1", "search", group_size, importance)
    rounded = scales.choose(weight, "m1", rounding, group_size)
    assert searched.raised == rounded.raised == 0
    have, limit = costs(weight, searched, importance), costs(weight, rounded, importance)
    assert (have <= limit * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("kind", "rounding"),
    [("free", "nearest"), ("m2", "ceil"), ("m2", "floor"), ("m2", "nearest")],
)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_search_beats_rounding_on_the_whole(
    kind: Kind, rounding: Rounding, group_size: int
) -> None:
    """On the whole only: under M2 the row scale that rounding has is none of the searched."""
    weight, importance = heavy_tailed(64, COLUMNS), importances(COLUMNS, 1)
    searched = scales.choose(weight, kind, "search", group_size, importance)
    rounded = scales.choose(weight, kind, rounding, group_size, importance)
    have, limit = costs(weight, searched, importance), costs(weight, rounded, importance)
    assert have.sum() < 0.97 * limit.sum()


@pytest.mark.parametrize("kind", ["free", "m2"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_searched_scales_get_better_with_freedom(kind: Kind, group_size: int) -> None:
    weight = normal(64, COLUMNS)
    ones = torch.ones(COLUMNS)
    tighter: Kind = "m1" if kind == "m2" else "m2"
    loose = costs(weight, scales.choose(weight, kind, "search", group_size), ones).sum(1)
    tight = costs(weight, scales.choose(weight, tighter, "search", group_size), ones).sum(1)
    assert (loose <= tight * (1 + 1e-5)).all()  # every tighter choice was among the looser ones


@pytest.mark.parametrize("kind", ["free", "m1", "m2"])
def test_importance_decides_what_may_clip(kind: Kind) -> None:
    weight = torch.tensor([[7.9, 0.5, -0.5, 0.5, -0.5]])
    matters, ignored = torch.ones(5), torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])
    with_outlier = scales.choose(weight, kind, "search", 5, matters)
    without = scales.choose(weight, kind, "search", 5, ignored)
    assert without.per_group() <= 1.0 < with_outlier.per_group()
    assert costs(weight, without, ignored).sum() == 0


@pytest.mark.parametrize("kind", ["free", "m1", "m2"])
def test_no_importance_is_the_same_importance(kind: Kind) -> None:
    weight = normal(8, 96)
    without = scales.choose(weight, kind, "search", 32)
    with_ones = scales.choose(weight, kind, "search", 32, torch.full((96,), 4.0))
    assert torch.equal(without.per_group(), with_ones.per_group())


@pytest.mark.parametrize("kind", ["free", "m1", "m2"])
def test_rows_are_searched_in_chunks(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = normal(10, 96), importances(96, 0)
    whole = scales.choose(weight, kind, "search", 32, importance)
    monkeypatch.setattr(scales, "SEARCH_ROWS", 3)
    chunked = scales.choose(weight, kind, "search", 32, importance)
    assert torch.equal(whole.per_group(), chunked.per_group())


# Arithmetic.


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_powers_of_two_are_exact(dtype: torch.dtype) -> None:
    exponents = range(-149, 128)
    powers = scales.power_of_two(torch.tensor(exponents, dtype=dtype))
    assert powers.dtype == torch.float32
    assert powers.tolist() == [math.ldexp(1.0, exponent) for exponent in exponents]
    held = scales.power_of_two(torch.tensor([-150, -1000, 128, 1000], dtype=dtype))
    assert held.tolist() == [2.0**-149, 2.0**-149, 2.0**127, 2.0**127]


def bfloat16s(draw: st.DrawFn) -> float:
    return (128 + draw(st.integers(0, 127))) * 2.0 ** draw(st.integers(-107, 100))


@st.composite
def codes_and_scales(draw: st.DrawFn) -> tuple[Tensor, Scales]:
    """Codes and scales as the format admits them, some groups and rows of zeros."""
    kind = draw(st.sampled_from(("free", "m1", "m2")))
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    size = draw(st.integers(1, 12))
    groups = -(-columns // size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    codes = torch.randint(16, (rows, columns), generator=generator)
    codes[codes == 8] = 0
    empty = torch.rand(rows, groups, generator=generator) < 0.3
    codes[empty.repeat_interleave(size, 1)[:, :columns]] = 0
    factors = [[bfloat16s(draw) for _ in range(groups)] for _ in range(rows)]
    factor = torch.tensor(factors)
    exponent = torch.randint(-11, 1, (rows, groups), generator=generator)
    if kind == "free":
        exponent.zero_()
    elif kind == "m2":
        factor = factor[:, :1]
        exponent -= exponent.amax(1, keepdim=True)
    else:
        factor = torch.ones(rows, 1)
        exponent += torch.tensor([[draw(st.integers(-100, 100))] for _ in range(rows)])
    return codes.to(torch.uint8), Scales(kind, factor, exponent.to(torch.int16), size, 5)


@settings(max_examples=150, deadline=None)
@given(codes_and_scales())
def test_dequantizing_is_exact(case: tuple[Tensor, Scales]) -> None:
    codes, given_scales = case
    values = scales.dequantize(codes, given_scales)
    assert values.dtype == torch.float32
    per_group = given_scales.per_group()
    for n, row in enumerate(codes.tolist()):
        for k, code in enumerate(row):
            g = k // given_scales.group_size
            factor = given_scales.factor[n, g if given_scales.kind == "free" else 0].item()
            scale = Fraction(factor) * Fraction(2) ** int(given_scales.exponent[n, g])
            sign = -1 if code >= 8 else 1
            assert Fraction(per_group[n, g].item()) == scale
            assert Fraction(values[n, k].item()) == sign * Fraction(VALUES[code % 8]) * scale


@settings(max_examples=150, deadline=None)
@given(codes_and_scales())
def test_canonical_scales_mean_the_same(case: tuple[Tensor, Scales]) -> None:
    codes, given_scales = case
    canonical = scales.canonical(codes, given_scales)
    before = scales.dequantize(codes, given_scales)
    after = scales.dequantize(codes, canonical)
    assert torch.equal(before.view(torch.int32), after.view(torch.int32))
    assert (canonical.kind, canonical.group_size) == (given_scales.kind, given_scales.group_size)
    assert canonical.raised == 5
    if given_scales.kind == "free":
        assert torch.equal(canonical.per_group(), given_scales.per_group())
        return
    assert canonical.exponent.dtype == torch.int16
    assert canonical.span is not None
    assert canonical.span <= 11
    if canonical.kind == "m2":
        assert (canonical.exponent.amax(1) == 0).all()
    groups = grouped(codes, canonical.group_size)
    for n, largest in enumerate(canonical.exponent.amax(1).tolist()):
        empty = [not group[n].any() for group in groups]
        for g, exponent in enumerate(canonical.exponent[n].tolist()):
            if all(empty):
                assert exponent == 0
            elif empty[g]:
                assert exponent == largest
            else:
                assert exponent == given_scales.exponent[n, g]
        assert canonical.factor[n] == (1 if all(empty) else given_scales.factor[n])


def test_canonical_scales_of_weights_that_vanish() -> None:
    """Groups that are not zero but become so when they are raised, or are too tiny."""
    weight = torch.tensor([[6.0, 6.0, 1e-9, 1e-9], [1e-38] * 4, [0.0] * 4])
    for kind in ("m1", "m2"):
        chosen = scales.choose(weight, kind, "floor", 2)
        codes = scales.quantize(weight, chosen)
        assert not codes[0, 2:].any()
        assert not codes[1].any()
        canonical = scales.canonical(codes, chosen)
        assert canonical.exponent.tolist() == [[0, 0], [0, 0], [0, 0]]
        assert canonical.factor.tolist() == [[1.0], [1.0], [1.0]]
