"""The grid of a quantized weight, drawn out so that a place on it can be any number.

A place is counted in steps: of E2M1 0, 0.5, 1, 1.5, 2, 3, 4, 6 are the places 0 to 7, and a
weight's code is the nearest whole number. All is done in slices of rows, so that what a slice needs
in float32 is small beside the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from zqfp_convert.numerics import codebook
from zqfp_convert.numerics.codebook import Codebook
from zqfp_convert.numerics.scales import Scales, power_of_two

TOP = codebook.SIZE - 1  # the last place; the first is -TOP
ELEMENTS_AT_ONCE = 1 << 24  # of a weight
Operation = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Grid:
    """What the places of a weight `[N, K]` stand for, row scales aside.

    Attributes:
        scale: float32 `[N, G]`, of each group; without the row scale where rows have one.
        choice: uint8 `[N, G]`, 1 where the second codebook holds; None with one.
        group_size, columns: of the weight.
        values: float32, of the places -7 to 7, one codebook after another.
        slopes: float32, of the steps from 0, 1, ... 6, likewise.
    """

    scale: Tensor
    choice: Tensor | None
    group_size: int
    columns: int
    values: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, scales: Scales, columns: int) -> Grid:
        """The grid that scales make for that many columns."""
        values, slopes = _tables(scales.books)
        scale = power_of_two(scales.exponent) if scales.kind == "m2" else scales.per_group()
        choice = None if scales.choice is None else scales.choice.to(torch.uint8)
        device = scale.device
        return cls(scale, choice, scales.group_size, columns, values.to(device), slopes.to(device))

    def slices(self) -> Iterator[slice]:
        """The rows, some at a time."""
        size = max(1, ELEMENTS_AT_ONCE // self.columns)
        for start in range(0, len(self.scale), size):
            yield slice(start, start + size)

    def value(self, place: Tensor, rows: slice) -> Tensor:
        """What the codes nearest to places `[rows, K]` stand for."""
        index = place.round().clamp_(-TOP, TOP).add_(TOP)
        return self._scaled(self._look_up(self.values, index, rows), rows)

    def slope(self, place: Tensor, rows: slice) -> Tensor:
        """How fast the value would grow at places `[rows, K]` if it were not rounded.

        Linear from code to code, and nothing beyond the last; nor at 0 exactly, where only weights
        in rows of zeros start, which have no scale to be anything else.
        """
        size = place.abs()
        idle = (size > TOP) | (size == 0)
        slope = self._look_up(self.slopes, size.floor_().clamp_(max=TOP - 1), rows)
        return self._scaled(slope, rows).masked_fill_(idle, 0.0)

    def place_of(self, value: Tensor, rows: slice) -> Tensor:
        """Where values `[rows, K]`, in units of the scale, lie; beyond 7 as from 6 to 7."""
        size = value.abs()
        below = torch.zeros_like(size)
        for code in range(1, TOP):
            bound = self._look_up(self.values, torch.full_like(size, code + TOP), rows)
            below += size >= bound
        low = self._look_up(self.values, below + TOP, rows)
        step = self._look_up(self.slopes, below, rows)
        return (below + (size - low) / step).clamp_max(2.0 * TOP).copysign(value)

    def _look_up(self, table: Tensor, index: Tensor, rows: slice) -> Tensor:
        """Elements of each group's own part of a table; `index` `[rows, K]`, whole numbers."""
        if self.choice is not None:
            own = self.choice[rows].float() * (len(table) // 2)
            index = self._per_group(index, own, torch.add)
        flat = index.to(torch.int32).flatten()
        return table.index_select(0, flat).view(index.shape)

    def _scaled(self, values: Tensor, rows: slice) -> Tensor:
        return self._per_group(values, self.scale[rows], torch.mul)

    def _per_group(self, values: Tensor, own: Tensor, operation: Operation) -> Tensor:
        """`operation` of values `[rows, K]` with what each group `[rows, G]` has."""
        missing = -values.shape[1] % self.group_size
        whole = pad(values, (0, missing)) if missing else values
        groups = whole.view(len(values), -1, self.group_size)  # [rows, G, group_size]
        return operation(groups, own[..., None]).view(whole.shape)[:, : values.shape[1]]


def _tables(books: tuple[Codebook, ...]) -> tuple[Tensor, Tensor]:
    magnitudes = torch.tensor(books)  # [books, 8]
    values = torch.cat((-magnitudes[:, 1:].flip(1), magnitudes), 1)
    return values.flatten(), magnitudes.diff(dim=1).flatten()
