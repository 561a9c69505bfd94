"""Codebooks: the magnitudes that the eight codes of each sign stand for.

E2M1 is one. Any seven E4M3 numbers from 0.5 to 7, and 0, do as well: times 2^-5 to 2^6, all shifts
that a row can have, they are normal E4M3 numbers, so a table of eight bytes turns codes into FP8 at
the same speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from zqfp_convert.numerics import e2m1

Codebook = tuple[float, ...]

SIZE = len(e2m1.MAGNITUDES)
STEPS = 32  # of which halves of sums of E4M3 numbers from 0.5 on are multiples
MOST = 7 * STEPS
# E4M3 numbers from 0.5 to 7.
MAGNITUDES = frozenset(
    (8 + mantissa) * 2.0**exponent
    for exponent in range(-4, 0)
    for mantissa in range(8)
    if (8 + mantissa) * 2.0**exponent <= 7
)
E2M1: Codebook = e2m1.MAGNITUDES

# For each group the better one of two. Their 14 magnitudes have the least weighted sum of squared
# errors under M2, groups of 128, for normal (weight .5) and Student's t (10 degrees of freedom .3,
# 5 degrees .2) random weights, among those that moving one or several of them by a step of E4M3
# leads to: 0.82, 0.86 and 0.90 of E2M1's error.
PAIR: tuple[Codebook, Codebook] = (
    (0.0, 0.5, 1.0, 1.625, 2.25, 3.0, 4.0, 5.5),
    (0.0, 0.625, 1.25, 2.0, 2.75, 3.75, 5.0, 7.0),
)


def admissible(book: Codebook) -> bool:
    """Whether a codebook rises from 0 in E4M3 numbers from 0.5 to 7."""
    if len(book) != SIZE or book[0] != 0:
        return False
    rises = all(low < high for low, high in pairwise(book))
    return rises and all(magnitude in MAGNITUDES for magnitude in book[1:])


@cache
def _tables(books: tuple[Codebook, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The value and the code of each cell, book after book: float32 and uint8.

    Cell `2 k` is the point `k / STEPS`, `2 k + 1` what lies between it and the next; they go from
    `-MOST` to `MOST`, and one more is for NaN. Halfway between two magnitudes of a codebook lie
    points, so that a cell has one nearest value.
    """
    values: list[float] = []
    codes: list[int] = []
    for book in books:
        assert all((magnitude * STEPS / 2).is_integer() for magnitude in book)
        for cell in range(-2 * MOST, 2 * MOST + 1):
            code = _nearest(abs(cell) / 2, book)
            values.append(-book[code] if cell < 0 else book[code])
            codes.append(code + SIZE if cell < 0 < code else code)
        values.append(float("nan"))
        codes.append(SIZE - 1)
    with torch.inference_mode(False):  # made once; on a GPU it is a copy which waits
        return (
            torch.tensor(values, device=device),
            torch.tensor(codes, dtype=torch.uint8, device=device),
        )


@cache
def _values(books: tuple[Codebook, ...], device: torch.device) -> Tensor:
    """The value of each code, book after book: float32."""
    values = [value for book in books for value in book + tuple(-value for value in book)]
    with torch.inference_mode(False):  # as above
        return torch.tensor(values, device=device)


def _nearest(steps: float, book: Codebook) -> int:
    """The code of the magnitude nearest to so many steps; of two the smaller, for E2M1 the even."""
    even = book == E2M1

    def distance(code: int) -> tuple[float, int]:
        return abs(book[code] * STEPS - steps), code % 2 if even else code

    return min(range(SIZE), key=distance)


def _cells(values: Tensor, second: Tensor | None) -> Tensor:
    """The cell of each value, int32 `[values]`; in the second codebook's part where so marked."""
    wide = values if values.dtype == torch.float64 else values.float()
    steps = (wide * STEPS).clamp_(-MOST, MOST)
    cells = steps.floor().add_(steps.ceil_()).nan_to_num_(nan=2 * MOST + 1).add_(2 * MOST)
    if second is not None:
        cells.add_(second, alpha=4 * MOST + 2)
    return cells.flatten().int()


def round_to(values: Tensor, *books: Codebook, second: Tensor | None = None) -> Tensor:
    """The nearest values of a codebook; halfway between two of them the smaller, for E2M1 the even.

    Signs of zeros and NaN stay. dtype and shape are kept (a floating dtype). Of two codebooks the
    second holds where `second`, bool of a shape that expands to that of the values, is true.
    """
    table = _tables(books, values.device)[0]
    nearest = table.index_select(0, _cells(values, second)).view(values.shape)
    return nearest.to(values.dtype).copysign_(values)


def encode(values: Tensor, *books: Codebook, second: Tensor | None = None) -> Tensor:
    """The code of the nearest value of each element, uint8 of the same shape, never 8 (-0)."""
    table = _tables(books, values.device)[1]
    return table.index_select(0, _cells(values, second)).view(values.shape)


def decode(codes: Tensor, *books: Codebook, second: Tensor | None = None) -> Tensor:
    """The float32 value of each code (uint8, 0 to 15); code 8 gives -0."""
    index = codes.int() if second is None else codes.int().add_(second, alpha=2 * SIZE)
    table = _values(books, codes.device)
    return table.index_select(0, index.flatten()).view(codes.shape)


def split(magnitudes: Sequence[float]) -> tuple[Codebook, ...]:
    """The codebooks of which these are the magnitudes, one after another."""
    starts = range(0, len(magnitudes), SIZE)
    return tuple(tuple(magnitudes[start : start + SIZE]) for start in starts)
