"""Scales of groups of weights: unconstrained, M1 (powers of two), M2 (row scale x powers of two).

Every function takes a weight `[N, K]` and returns `Scales` that keep the rules of the format:
span at most 11, a row's largest exponent 0 under M2, harmless values for groups of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal

import torch
from torch import Tensor

from zqfp_convert.numerics import codebook, kernels
from zqfp_convert.numerics.codebook import Codebook

Kind = Literal["free", "m1", "m2"]
Rounding = Literal["ceil", "floor", "nearest", "search"]

MAX_SPAN = 11
MIN_FACTOR = 2.0**-100  # groups whose largest weight is smaller count as zeros
MAX_FACTOR = 2.0**125  # seven times it is still a float32
MANTISSAS = 16  # of the searched scales, 2^(i/16)
SEARCH_ROWS = 2048  # rows searched at a time, to bound the memory
LARGEST_GROUP = 4096  # that the search's kernel holds


@dataclass(frozen=True)
class Scales:
    """The scale of group g of row n is `factor[n, g or 0] * 2^exponent[n, g]`.

    Attributes:
        kind: the constraint that they keep.
        factor: float32, holding bfloat16 values: `[N, G]` (free), `[N, 1]` (M2: the row scales;
            M1: ones).
        exponent: int16 `[N, G]`; zeros where scales are free, at most 0 under M2.
        group_size: columns that share a scale; the last group may be shorter.
        raised: how many groups the limit on the span has lifted to a larger scale; as `choose` has
            counted them an int64 tensor `[]`, for which nobody has waited yet.
        books: one codebook, or two.
        choice: of two: bool `[N, G]`, the second one where true.
    """

    kind: Kind
    factor: Tensor
    exponent: Tensor
    group_size: int
    raised: int | Tensor = 0
    books: tuple[Codebook, ...] = (codebook.E2M1,)
    choice: Tensor | None = None

    def per_group(self) -> Tensor:
        """The scales as float32 `[N, G]`, exact."""
        return self.factor * power_of_two(self.exponent)

    def per_column(self, columns: Tensor) -> Tensor:
        """The scales of the given columns (int64 `[C]`) as float32 `[N, C]`."""
        return self.per_group()[:, columns // self.group_size]

    def marks(self, columns: Tensor) -> Tensor:
        """`per_column`, negative where the second codebook holds: what `round` needs to know."""
        return self.marked[:, columns // self.group_size]

    @cached_property
    def marked(self) -> Tensor:
        """`per_group`, negative where the second codebook holds, float32 `[N, G]`."""
        scale = self.per_group()
        return scale if self.choice is None else torch.where(self.choice, -scale, scale)

    def round(self, values: Tensor, marks: Tensor) -> Tensor:
        """The representable values nearest to `values` under `marks` (shapes that broadcast)."""
        scale = marks.abs()
        second = None if self.choice is None else marks < 0
        return codebook.round_to(values / scale, *self.books, second=second).mul_(scale)

    @property
    def span(self) -> int | None:
        """The largest span of any row; None where scales are free."""
        if self.kind == "free":
            return None
        return int(self.spans.max())

    @property
    def spans(self) -> Tensor:
        """Of each row: its largest exponent minus its smallest, int16 `[N]`."""
        return self.exponent.amax(1) - self.exponent.amin(1)


def choose(
    weight: Tensor,
    kind: Kind,
    rounding: Rounding,
    group_size: int,
    importance: Tensor | None = None,
    books: tuple[Codebook, ...] = (codebook.E2M1,),
) -> Scales:
    """Choose the scales of a weight.

    Roundings of the ideal scale `S = absmax / 6` (the codebook's largest) of each group:
        free: `nearest` keeps S; `search` tries 32 scales from 3/4 S to 3 S.
        m1: `2^ceil(log2 S)` never clips, `floor` clips, `nearest` is nearest in log2 and may.
        m2: the row scale is the row's largest S; a group has it over `2^r(log2(S_max / S))`:
            r = `floor` never clips; `ceil` (ZeroQuant-FP as printed) shrinks scales, and clips;
            `nearest` may clip.
        m1 and m2 with `search`: of two exponents for each group (m2: and 16 mantissas of the row
            scale) those with the least `sum_k importance_k (w_k - quantized_k)^2`. Exponents that
            would clip the largest weight to less than 3/4 of itself are not among them.

    Args:
        weight: `[N, K]`, any floating dtype, finite.
        importance: float `[K]`, not negative (the Hessian's diagonal); ones when absent. Only
            `search` uses it.
        books: one codebook, or two of which `search` gives each group the better one.
    """
    weight = weight.float()
    if rounding == "search":
        return _searched(weight, kind, group_size, importance, books)
    assert len(books) == 1, "a choice takes a search"
    return replace(_rounded(weight, kind, rounding, group_size, books[0][-1]), books=books)


def _rounded(
    weight: Tensor, kind: Kind, rounding: Rounding, group_size: int, largest_code: float
) -> Scales:
    absmax = _absmax(_grouped(weight, group_size))  # [N, G]
    ideal = absmax / largest_code
    match kind:
        case "free":
            return _free(ideal, group_size)
        case "m1":
            exponent = _log2(ideal, rounding)
            return _constrained("m1", torch.ones_like(ideal[:, :1]), exponent, absmax, group_size)
        case "m2":
            largest = ideal.amax(1, keepdim=True)
            ratio = largest / torch.maximum(ideal, largest * 2.0**-40)  # far below any span
            exponent = -_log2(ratio, rounding)
            factor = _bfloat16_up(largest) if rounding == "floor" else largest
            return _constrained("m2", factor, exponent, absmax, group_size)


def quantize(weight: Tensor, scales: Scales) -> Tensor:
    """The codes, uint8 `[N, K]`, of the values nearest to `weight / scale`."""
    width, size = weight.shape[1], scales.group_size
    steps = weight.float() / _spread(scales.per_group(), width, size)
    second = None if scales.choice is None else _spread(scales.choice, width, size)
    return codebook.encode(steps, *scales.books, second=second)


def dequantize(codes: Tensor, scales: Scales) -> Tensor:
    """The float32 weight `[N, K]` that codes uint8 `[N, K]` and scales stand for."""
    width, size = codes.shape[1], scales.group_size
    second = None if scales.choice is None else _spread(scales.choice, width, size)
    values = codebook.decode(codes, *scales.books, second=second)
    values *= _spread(power_of_two(scales.exponent), width, size)
    values *= _spread(scales.factor, width, size) if scales.kind == "free" else scales.factor
    return values


def power_of_two(exponent: Tensor) -> Tensor:
    """`2^exponent` as float32, exact on every device; exponents are held within [-149, 127]."""
    exponent = exponent.to(torch.int32).clamp(-149, 127)
    normal = (exponent.clamp_min(-126) + 127) << 23
    subnormal = torch.ones_like(exponent) << (exponent + 149).clamp_max(22)
    return torch.where(exponent < -126, subnormal, normal).view(torch.float32)


def canonical(codes: Tensor, scales: Scales) -> Scales:
    """The scales with the format's values where every code of a group or of a row is 0.

    Such a group gets its row's largest exponent and the first codebook, such a row factor 1 and
    exponents 0; what codes and scales stand for does not change. Free scales stay as they are.
    """
    if scales.kind == "free":
        return scales
    empty = _grouped(codes, scales.group_size).amax(-1) == 0  # [N, G]
    zero_row = empty.all(1, keepdim=True)
    exponent = torch.where(empty, scales.exponent.amax(1, keepdim=True), scales.exponent)
    return replace(
        scales,
        exponent=exponent.masked_fill(zero_row, 0),
        factor=scales.factor.masked_fill(zero_row, 1.0),
        choice=None if scales.choice is None else scales.choice & ~empty,
    )


def stack(parts: Sequence[Scales]) -> Scales:
    """The scales of all rows, given those of some rows each."""
    choices = [part.choice for part in parts if part.choice is not None]
    return replace(
        parts[0],
        factor=torch.cat([part.factor for part in parts]),
        exponent=torch.cat([part.exponent for part in parts]),
        raised=sum(part.raised for part in parts),
        choice=torch.cat(choices) if choices else None,
    )


def _grouped(values: Tensor, group_size: int) -> Tensor:
    """`[N, K]` to `[N, G, group_size]`, the last group filled up with zeros."""
    missing = -values.shape[-1] % group_size
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return padded.reshape(*values.shape[:-1], -1, group_size)


def _spread(groups: Tensor, columns: int, group_size: int) -> Tensor:
    """What groups `[N, G]` have, for each of their columns: `[N, K]`."""
    return groups[..., None].expand(*groups.shape, group_size).flatten(1)[:, :columns]


def _absmax(groups: Tensor) -> Tensor:
    """The largest magnitude in each group, 0 where it is next to nothing."""
    largest = groups.abs().amax(-1)
    return torch.where(largest < MIN_FACTOR, 0.0, largest)


def _log2(values: Tensor, rounding: Rounding) -> Tensor:
    """log2 of positive values, rounded to whole numbers: int32, exact at powers of two."""
    mantissa, exponent = torch.frexp(values)  # value = mantissa * 2^exponent, mantissa in [0.5, 1)
    above = {"ceil": 0.5, "nearest": 0.5**0.5}.get(rounding)
    floor: Tensor = exponent - 1
    return floor if above is None else floor + (mantissa > above).int()


def _bfloat16_up(values: Tensor) -> Tensor:
    """The smallest bfloat16 number not below each positive value, as float32."""
    nearest = values.bfloat16()
    up = torch.nextafter(nearest, torch.full_like(nearest, float("inf")))
    return torch.where(nearest.float() < values, up, nearest).float()


def _free(ideal: Tensor, group_size: int) -> Scales:
    value = ideal.clamp(MIN_FACTOR, MAX_FACTOR).bfloat16().float()
    value = torch.where(ideal > 0, value, 1.0)
    return Scales("free", value, torch.zeros_like(value, dtype=torch.int16), group_size)


def _constrained(
    kind: Kind, factor: Tensor, exponent: Tensor, absmax: Tensor, group_size: int
) -> Scales:
    """Make factors `[N, 1]` and whole exponents `[N, G]` keep the rules of the format."""
    empty = absmax == 0  # groups of zeros: their exponent means nothing yet
    lowest = torch.iinfo(torch.int16).min
    exponent = exponent.to(torch.int16).masked_fill(empty, lowest)
    largest = exponent.amax(1, keepdim=True)  # [N, 1]
    zero_row = empty.all(1, keepdim=True)
    largest = largest.masked_fill(zero_row, 0)
    factor = factor.masked_fill(zero_row, 1.0)
    if kind == "m2":  # move the largest exponent into the row scale
        factor = factor * power_of_two(largest)
        factor = factor.clamp(MIN_FACTOR, MAX_FACTOR).bfloat16().float()
        exponent = torch.where(empty, exponent, exponent - largest)
        largest = torch.zeros_like(largest)
    else:
        largest = largest.clamp(-100, 125)
        exponent = exponent.clamp_max(125)
    too_low = ~empty & (exponent < largest - MAX_SPAN)
    exponent = torch.maximum(exponent, largest - MAX_SPAN)
    exponent = torch.where(empty, largest, exponent)
    return Scales(kind, factor, exponent, group_size, too_low.sum())


def _searched(
    weight: Tensor,
    kind: Kind,
    group_size: int,
    importance: Tensor | None,
    books: tuple[Codebook, ...],
) -> Scales:
    """Try mantissas `m = 2^(i/16)` and, for each group, two exponents with each codebook.

    With the smaller exponent the group's largest weight lies in `[2/3, 4/3)` of the largest code
    (for E2M1 in [4, 8) scale steps; it may clip at 6), with one more in `[1/3, 2/3)`.
    """
    if importance is None:
        importance = torch.ones(weight.shape[1], device=weight.device)
    mantissa_values = _mantissas(1 if kind == "m1" else MANTISSAS, weight.device)
    grouped_importance = _grouped(importance.float()[None], group_size)  # [1, G, group_size]
    absmax = _absmax(_grouped(weight, group_size))  # [N, G]
    factors, exponents, choices = [], [], []
    for start in range(0, weight.shape[0], SEARCH_ROWS):
        groups = _grouped(weight[start : start + SEARCH_ROWS], group_size)
        cost, exponent, second = _costs(groups, grouped_importance, mantissa_values, books)
        if kind != "free":  # one mantissa for a whole row
            cost = cost.sum(-1, keepdim=True)
        best = cost.argmin(0)  # [rows, G or 1]
        factors.append(mantissa_values[best])
        best = best.expand(exponent.shape[1:])[None]
        exponents.append(exponent.gather(0, best)[0])
        choices.append(second.gather(0, best)[0])
    factor, exponent = torch.cat(factors), torch.cat(exponents)
    if kind == "free":
        value = factor * power_of_two(exponent)
        found = _free(value.masked_fill(absmax == 0, 0.0), group_size)
    else:
        found = _constrained(kind, factor, exponent, absmax, group_size)
    choice = torch.cat(choices) if len(books) > 1 else None
    return replace(found, books=books, choice=choice)


@cache
def _mantissas(count: int, device: torch.device) -> Tensor:
    """The first of those that are searched, as bfloat16 has them, float32."""
    mantissas = [2.0 ** (i / MANTISSAS) for i in range(count)]
    with torch.inference_mode(False):  # made once; on a GPU it is a copy which waits
        return torch.tensor(mantissas, device=device).bfloat16().float()


def _costs(
    groups: Tensor, importance: Tensor, mantissas: Tensor, books: tuple[Codebook, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """For each mantissa the cost of each group, its exponent, and whether it has the second book.

    Each `[mantissas, N, G]`.
    """
    if kernels.take(groups) and groups.shape[-1] <= LARGEST_GROUP:
        from zqfp_convert.numerics.kernels import search

        return search.costs(groups.contiguous(), importance, mantissas, books)
    costs, exponents, seconds = [], [], []
    for mantissa in mantissas:
        cost, exponent = _best(groups, importance, mantissa, books[0])
        second = torch.zeros_like(cost, dtype=torch.bool)
        for book in books[1:]:
            cost_of, exponent_of = _best(groups, importance, mantissa, book)
            second = cost_of < cost
            cost = torch.where(second, cost_of, cost)
            exponent = torch.where(second, exponent_of, exponent)
        costs.append(cost)
        exponents.append(exponent)
        seconds.append(second)
    return torch.stack(costs), torch.stack(exponents), torch.stack(seconds)


def _best(
    groups: Tensor, importance: Tensor, mantissa: Tensor, book: Codebook
) -> tuple[Tensor, Tensor]:
    """Of two exponents the better one: its cost and itself, both `[N, G]`."""
    clipped = torch.full_like(mantissa, book[-1] * 4 / 3)
    low = _log2(groups.abs().amax(-1) / mantissa / clipped, "floor") + 1
    cost_low = _cost(groups, importance, mantissa * power_of_two(low), book)
    cost_high = _cost(groups, importance, mantissa * power_of_two(low + 1), book)
    lower = cost_low <= cost_high
    return torch.where(lower, cost_low, cost_high), torch.where(lower, low, low + 1)


def _cost(groups: Tensor, importance: Tensor, scale: Tensor, book: Codebook) -> Tensor:
    """Weighted squared error of each group `[N, G]` under scales `[N, G]`."""
    scale = scale[..., None]
    error = groups - codebook.round_to(groups / scale, book) * scale
    return torch.einsum("ngk,gk->ng", error.square(), importance[0])
