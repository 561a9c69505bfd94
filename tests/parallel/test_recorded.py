"""Files that processes take turns at writing: each is recorded before the next one is begun."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import processes
import pytest
import torch

from zqfp_convert.checkpoint.output.partial import Partial
from zqfp_convert.checkpoint.output.series import Series
from zqfp_convert.parallel import World

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

FILES = [f"checkpoint/{number}.safetensors" for number in range(4)]


def fail_after_three(out: Path, world: World) -> None:
    with (
        pytest.raises(KeyError),
        Partial(out, {}, world=world) as made,
        Series(made, FILES) as series,
    ):
        for number in range(3):
            series.add({"x": torch.full((2,), number)}, waiting=2)
            assert all(made.is_whole(file) for file in FILES[:number])
        raise KeyError


def go_on(out: Path, world: World) -> None:
    with Partial(out, {}, world=world) as made, Series(made, FILES) as series:
        assert series.done == 2


def test_what_was_written_is_not_lost_with_what_failed(tmp_path: Path) -> None:
    for work in (fail_after_three, go_on):
        processes.run(2, partial(work, tmp_path / "out"), tmp_path / "log")
