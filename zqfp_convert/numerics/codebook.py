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
def _table(book: Codebook, device: torch.device) -> Tensor:
    """Made once, for solvers that round each column: on a GPU it is a copy which waits."""
    with torch.inference_mode(False):
        return torch.tensor(book, device=device)


@cache
def _middles(book: Codebook, device: torch.device) -> Tensor:
    table = _table(book, device)
    with torch.inference_mode(False):
        return (table[1:] + table[:-1]) / 2


def round_to(values: Tensor, book: Codebook) -> Tensor:
    """The nearest values of a codebook; halfway between two of them the smaller, for E2M1 the even.

    Signs of zeros and NaN stay. dtype and shape are kept (a floating dtype).
    """
    if book == E2M1:
        return e2m1.round_to_grid(values)
    table = _table(book, values.device)
    magnitude = values.abs().float().contiguous()
    nearest = table[torch.bucketize(magnitude, _middles(book, values.device))]
    nearest = torch.where(magnitude.isnan(), magnitude, nearest)
    return nearest.to(values.dtype).copysign(values)


def encode(values: Tensor, book: Codebook) -> Tensor:
    """The code of the nearest value of each element, uint8 of the same shape, never 8 (-0)."""
    grid = round_to(values, book).float().contiguous()
    bounds = _table(book, values.device)[1:]
    code = torch.bucketize(grid.abs(), bounds, right=True).to(torch.uint8)
    return code | ((grid < 0).to(torch.uint8) << 3)


def decode(codes: Tensor, book: Codebook) -> Tensor:
    """The float32 value of each code (uint8, 0 to 15); code 8 gives -0."""
    table = torch.tensor(book + tuple(-value for value in book), device=codes.device)
    return table[codes.int()]


def split(magnitudes: Sequence[float]) -> tuple[Codebook, ...]:
    """The codebooks of which these are the magnitudes, one after another."""
    starts = range(0, len(magnitudes), SIZE)
    return tuple(tuple(magnitudes[start : start + SIZE]) for start in starts)
