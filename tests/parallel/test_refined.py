"""Weights that processes refine together where a fit of factors fails: all make it anew, alike."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from torch import Tensor

from zqfp_convert.parallel import World
from zqfp_convert.quantize import lorc
from zqfp_convert.quantize.hessian import prepare
from zqfp_convert.quantize.weight import quantize_together
from zqfp_convert.recipe import Recipe

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

COLUMNS = 96


def normal(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))


def of_low_rank(rows: int, seed: int) -> Tensor:
    """What has no error in all rows but two, so that its error's rank is less than is asked for."""
    weight = torch.zeros(rows, COLUMNS)
    weight[:2] = normal(2, seed)
    return weight


def save_refined(folder: Path, world: World) -> None:
    """With fits that are asked in the end, and with ones that are each asked at once."""
    weights = [normal(24, 0), of_low_rank(24, 1), of_low_rank(3, 2), normal(9, 3), normal(40, 4)]
    inputs = normal(200, 5)
    recipe = Recipe.named("best", rank=4, group_size=32, low_rank_rounds=2, asymmetry=0.0)
    real = lorc.fit
    fits = [0, 0]
    careful = False

    def fit(*given: Any) -> tuple[Tensor, Tensor]:
        fits[careful] += 1
        if not careful:
            return real(*given)
        given[5].append(torch.tensor(True))
        return real(*given[:5])

    def solve() -> list[tuple[Tensor, Tensor]]:
        curvature = prepare(inputs.t() @ inputs / 200, None, damping=0.01, activation_order=True)
        solved = quantize_together(weights, curvature, recipe, world)
        return [(one.codes, one.dequantize()) for one in solved]

    lorc.fit = fit
    found = [solve()]
    careful = True
    found.append(solve())
    assert fits[0] == 2 * fits[1]
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    torch.save(found[0], folder / str(world.rank))


@pytest.mark.parametrize("count", [2, 3])
def test_all_make_anew_what_one_fit_failed_in(count: int, tmp_path: Path) -> None:
    processes.run(count, partial(save_refined, tmp_path), tmp_path / "log")
    first, *others = (torch.load(tmp_path / str(rank)) for rank in range(count))
    for other in others:
        for one, same in zip(first, other, strict=True):
            assert all(torch.equal(*pair) for pair in zip(one, same, strict=True))
