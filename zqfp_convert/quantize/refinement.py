"""Codes and low-rank factors of weights in turn, each found anew given the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from zqfp_convert.numerics.scales import Scales
from zqfp_convert.parallel import Share
from zqfp_convert.quantize import lorc
from zqfp_convert.quantize.descent import descend
from zqfp_convert.quantize.lorc import Factors
from zqfp_convert.recipe import Recipe

SWEEPS_PER_ROUND = 1  # of coordinate descent after each fit of the factors


@dataclass(frozen=True)
class Coded:
    """Weights on their way, one below the other, or the rows of a share of each: `[n, K]`.

    `target` is what to aim at, `quantized` the values of its codes under `grid`, which puts the
    `scales` of the weights together; `codes` are there where nothing is going to change them.
    """

    weights: Sequence[Tensor]
    shares: Sequence[Share]
    scales: Sequence[Scales]
    grid: Scales
    target: Tensor
    quantized: Tensor
    codes: Tensor | None

    def each(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The rows of each weight."""
        return apart(matrix, self.weights)

    def without(self, factors: Sequence[Factors]) -> Tensor:
        """The target less what the factors give."""
        found = zip(self.each(self.target), factors, self.shares, strict=True)
        return below([W - one.product(share.here) for W, one, share in found])


def apart(matrix: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The rows of weights that lie one below the other."""
    return torch.split(matrix, [len(part) for part in like])


def below(parts: Sequence[Tensor]) -> Tensor:
    """Matrices one below the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def refine(
    coded: Coded, metric: Tensor | None, rank: int, recipe: Recipe
) -> tuple[Tensor, Sequence[Factors]]:
    """What the codes are to stand for, float32 `[n, K]`, and the factors of each weight.

    `metric` is what the factors are the best in; without one there are no further rounds.
    """
    held: list[Tensor] = []  # whether each fit has: asked once, as a GPU is waited for then
    found = _rounds(coded, metric, rank, recipe, held)
    world = max((share.world for share in coded.shares), key=lambda world: world.size)
    if world.every(lambda: bool(torch.stack(held).all())):
        return found
    del found
    return _rounds(coded, metric, rank, recipe)


def _rounds(
    coded: Coded,
    metric: Tensor | None,
    rank: int,
    recipe: Recipe,
    later: list[Tensor] | None = None,
) -> tuple[Tensor, Sequence[Factors]]:
    Q = coded.quantized
    factors = _fitted(coded, Q, metric, rank, recipe, None, later)
    for _ in range(0 if metric is None else recipe.low_rank_rounds):
        assert metric is not None
        rest = coded.without(factors)
        Q = descend(rest, Q, metric, coded.grid, SWEEPS_PER_ROUND)
        del rest
        factors = _fitted(coded, Q, metric, rank, recipe, factors, later)
    return Q, factors


def _fitted(
    coded: Coded,
    quantized: Tensor,
    metric: Tensor | None,
    rank: int,
    recipe: Recipe,
    before: Sequence[Factors] | None,
    later: list[Tensor] | None,
) -> list[Factors]:
    """The factors of each weight, from those before on; `later` as in `lorc.fit`."""
    error = coded.target - quantized
    columns = error.shape[1]
    found: list[Factors] = []
    for run, rows in _alike(coded):
        share, stack = coded.shares[run[0]], (len(run),) if len(run) > 1 else ()
        most = min(rank, share.total, columns)
        start = None
        if before:
            start = below([before[at].B[share.here].float() for at in run])
            start = start.reshape(*stack, -1, most)
        E = error[rows].reshape(*stack, -1, columns)
        B, A = lorc.fit(E, metric, most, share, start, later)
        pairs = zip(B.reshape(len(run), -1, most), A.reshape(len(run), most, -1), strict=True)
        found += [lorc.encode(*pair, recipe.factors) for pair in pairs]
    return found


def _alike(coded: Coded) -> Iterator[tuple[list[int], slice]]:
    """Which weights, one below the other, have as many rows as one another, and those rows.

    Their factors are found at once, as that takes many small steps.
    """
    row = 0
    for _, group in groupby(range(len(coded.shares)), lambda at: coded.shares[at].total):
        run = list(group)
        rows = sum(len(coded.weights[at]) for at in run)
        yield run, slice(row, row + rows)
        row += rows
