"""Figures of many tokens against their definitions, and what the buckets of positions hold."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from zqfp_convert.evaluate.divergence import PerToken, per_token
from zqfp_convert.evaluate.figures import KL_EDGES, Figures, by_position
from zqfp_convert.evaluate.interval import interval


def some(windows: int, positions: int) -> PerToken:
    generator = torch.Generator().manual_seed(3)
    draws = [torch.rand(windows, positions, generator=generator) for _ in range(4)]
    return PerToken(draws[0], draws[1], draws[2] ** 4, draws[3] < 0.7)


def test_definitions() -> None:
    found = some(5, 23)
    figures = Figures.of(found)
    kl = found.kl.double()
    assert figures.tokens == 115
    assert figures.perplexity == pytest.approx(math.exp(found.loss.double().mean()))
    assert figures.original_perplexity == pytest.approx(
        math.exp(found.original_loss.double().mean())
    )
    for value, share in ((figures.kl_median, 0.5), (figures.kl_99, 0.99), (figures.kl_999, 0.999)):
        assert value == pytest.approx(float(kl.quantile(share)))
    assert figures.kl == interval(kl.mean(1))
    assert figures.kl.mean == pytest.approx(float(kl.mean()))
    difference = found.loss.double() - found.original_loss.double()
    assert figures.loss_difference == interval(difference.mean(1))
    assert figures.same_top == pytest.approx(float(found.same.double().mean()))


def test_the_histogram() -> None:
    found = some(5, 23)
    kl = found.kl
    kl.view(-1)[:6] = torch.tensor([0.0, 1e-9, 1e-6, 99.0, KL_EDGES[-1] * 1.01, 31.0])
    counts = Figures.of(found).kl_histogram
    assert len(counts) == len(KL_EDGES) + 1
    lows = [-math.inf, *KL_EDGES]
    highs = [*KL_EDGES, math.inf]
    values = kl.double().flatten().tolist()
    for count, low, high in zip(counts, lows, highs, strict=True):
        assert count == sum(low < value <= high for value in values)
    assert sum(counts) == kl.numel()
    assert math.log10(KL_EDGES[0]) == -6
    steps = [math.log10(high / low) for low, high in pairwise(KL_EDGES)]
    assert steps == pytest.approx([0.25] * len(steps))


@pytest.mark.parametrize(
    ("positions", "spans"),
    [
        (1, [(1, 1)]),
        (2, [(1, 1), (2, 2)]),
        (7, [(1, 1), (2, 3), (4, 7)]),
        (31, [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]),
        (20, [(1, 1), (2, 3), (4, 7), (8, 15), (16, 20)]),
    ],
)
def test_buckets(positions: int, spans: list[tuple[int, int]]) -> None:
    found = some(3, positions)
    buckets = by_position(found)
    assert [(bucket.first, bucket.last) for bucket in buckets] == spans
    assert sum(bucket.figures.tokens for bucket in buckets) == found.kl.numel()
    total = sum(bucket.figures.kl.mean * bucket.figures.tokens for bucket in buckets)
    assert total == pytest.approx(float(found.kl.double().sum()))
    last = buckets[-1]
    assert last.figures.kl.mean == pytest.approx(float(found.kl[:, last.first - 1 :].mean()))


def test_the_same_logits_differ_by_nothing() -> None:
    logits = 5 * torch.randn(3, 8, 40)
    found = per_token(logits, logits.clone(), torch.randint(40, (3, 8)))
    figures = Figures.of(found)
    assert (figures.kl.mean, figures.kl.half, figures.kl_999) == (0.0, 0.0, 0.0)
    assert figures.loss_difference.to_json() == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert figures.same_top == 1.0
    assert figures.perplexity == figures.original_perplexity
