"""What is told of many tokens: perplexities, quantiles of KL, intervals, all by position too.

Windows are the independent samples: tokens of one window are not, so intervals are taken over the
means of windows. Sums over tokens are in float64.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zqfp_convert.evaluate.divergence import PerToken
from zqfp_convert.evaluate.interval import Interval, interval

KL_EDGES = tuple(10 ** (quarter / 4) for quarter in range(-24, 7))  # nats, of the histogram


@dataclass(frozen=True)
class Figures:
    """How close two models are, over some predicted tokens; losses and KL in nats a token.

    Attributes:
        tokens: how many were predicted.
        perplexity: exp of the converted model's mean loss; original_perplexity: the original's.
        loss_difference: mean of the converted model's loss minus the original's on the same token.
        kl: mean KL(original || converted).
        kl_median, kl_99, kl_999: what half, 99 % and 99.9 % of the tokens stay under.
        same_top: share of the tokens at which both find the same token likeliest.
        kl_histogram: how many tokens have a KL up to the first of `KL_EDGES`, from there up to the
            second, and so on; the last number is of those above all edges.
    """

    tokens: int
    perplexity: float
    original_perplexity: float
    loss_difference: Interval
    kl: Interval
    kl_median: float
    kl_99: float
    kl_999: float
    same_top: float
    kl_histogram: tuple[int, ...]

    @classmethod
    def of(cls, found: PerToken) -> Figures:
        """The figures of tokens `[windows, positions]`."""
        loss, original = found.loss.double(), found.original_loss.double()
        kl = found.kl.double()
        ordered = kl.flatten().sort().values
        return cls(
            tokens=kl.numel(),
            perplexity=math.exp(float(loss.mean())),
            original_perplexity=math.exp(float(original.mean())),
            loss_difference=interval((loss - original).mean(1)),
            kl=interval(kl.mean(1)),
            kl_median=_quantile(ordered, 0.5),
            kl_99=_quantile(ordered, 0.99),
            kl_999=_quantile(ordered, 0.999),
            same_top=float(found.same.double().mean()),
            kl_histogram=_histogram(ordered),
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            key: value.to_json() if isinstance(value, Interval) else value
            for key, value in plain.items()
        }


@dataclass(frozen=True)
class Bucket:
    """The tokens that were predicted from `first` to `last` tokens before them, both included."""

    first: int
    last: int
    figures: Figures


def by_position(found: PerToken) -> list[Bucket]:
    """Tokens `[windows, positions]` in buckets of context: 1, 2 to 3, 4 to 7 and so on.

    Position `p` of the tensors is predicted from `p + 1` tokens of its window.
    """
    positions = found.kl.shape[1]
    buckets = []
    first = 1
    while first <= positions:
        last = min(2 * first - 1, positions)
        chosen = slice(first - 1, last)
        part = PerToken(
            found.loss[:, chosen],
            found.original_loss[:, chosen],
            found.kl[:, chosen],
            found.same[:, chosen],
        )
        buckets.append(Bucket(first, last, Figures.of(part)))
        first *= 2
    return buckets


def _histogram(ordered: Tensor) -> tuple[int, ...]:
    """How many of ascending values `[n]` lie up to each of `KL_EDGES`, and above the last."""
    edges = torch.tensor(KL_EDGES, dtype=ordered.dtype, device=ordered.device)
    up_to = [0, *torch.searchsorted(ordered, edges, right=True).tolist(), ordered.numel()]
    return tuple(above - below for below, above in pairwise(up_to))


def _quantile(ordered: Tensor, share: float) -> float:
    """The quantile of ascending values `[n]`, linear between neighbours."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    low, high = float(ordered[below]), float(ordered[above])
    return low + (place - below) * (high - low)
