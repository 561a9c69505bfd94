"""Student's interval against its printed table and its definition."""

from __future__ import annotations

import math

import pytest
import torch

from zqfp_convert.evaluate.interval import interval, student


@pytest.mark.parametrize(
    ("freedom", "table"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (15, 2.131),
     (30, 2.042), (120, 1.980), (10_001, 1.960)],
)  # fmt: skip
def test_the_table(freedom: int, table: float) -> None:
    assert student(freedom) == pytest.approx(table, abs=6e-4)


def test_the_definition() -> None:
    found = interval(torch.tensor([1.0, 2.0, 4.0, 5.0]))
    assert found.mean == 3.0
    assert found.half == pytest.approx(3.1824 * math.sqrt(10 / 3) / 2, rel=1e-4)
    assert found.to_json()["low"] == pytest.approx(3.0 - found.half)
    assert found.to_json()["high"] == pytest.approx(3.0 + found.half)


def test_a_single_sample_has_none() -> None:
    assert interval(torch.tensor([7.0])).to_json() == {"mean": 7.0, "low": None, "high": None}


def test_it_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 5, generator=generator)
    covered = sum(abs(found.mean) <= (found.half or 0) for found in map(interval, draws))
    assert covered / len(draws) == pytest.approx(0.95, abs=0.015)
