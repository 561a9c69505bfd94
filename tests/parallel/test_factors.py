"""Low-rank factors that processes find together, of rows each: as one process finds them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
from torch import Tensor

from zqfp_convert.parallel import ALONE, World
from zqfp_convert.quantize import lorc

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ERRORS = {
    "ordinary": normal(60, 90) * torch.logspace(0, -1, 90),
    "rank 3": normal(60, 3) @ normal(3, 90, seed=1),
    "one row": torch.zeros(60, 90).index_copy(0, torch.tensor([7]), normal(1, 90)),
    "zeros": torch.zeros(60, 90),
}


def fitted(kind: str, world: World) -> tuple[Tensor, Tensor]:
    """The factors from a random start, and from there once more."""
    error, inputs = ERRORS[kind], normal(180, 90, seed=2)
    share = world.share(len(error))
    B, _ = lorc.fit(error[share.here], inputs.t() @ inputs, 4, share)
    return lorc.fit(error[share.here], inputs.t() @ inputs, 4, share, B[share.here])


def save_fitted(kind: str, folder: Path, world: World) -> None:
    torch.save(fitted(kind, world), folder / str(world.rank))


@pytest.mark.parametrize("kind", ERRORS)
def test_all_have_the_factors_that_one_finds(kind: str, tmp_path: Path) -> None:
    processes.run(3, partial(save_fitted, kind, tmp_path), tmp_path / "log")
    first, *others = (torch.load(tmp_path / str(rank)) for rank in range(3))
    for other in others:
        assert all(torch.equal(one, same) for one, same in zip(first, other, strict=True))
    B, A = first
    alone_B, alone_A = fitted(kind, ALONE)
    assert torch.allclose(B @ A, alone_B @ alone_A, atol=1e-5 * float(ERRORS[kind].abs().max()))
    assert torch.allclose(B.t() @ B, torch.eye(4), atol=1e-5)
