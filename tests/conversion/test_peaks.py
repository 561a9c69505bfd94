"""What several processes have taken of the memory of one host, and of GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zqfp_convert.conversion import pipeline
from zqfp_convert.conversion.host import Peak
from zqfp_convert.parallel import World


class Told(World):
    """A world of which all that others say is known."""

    said: tuple[Any, ...] = ()

    def gather(self, value: Any) -> list[Any]:
        return [*self.said[: self.rank], value, *self.said[self.rank + 1 :]]


def test_processes_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peak, "host", lambda self: 8)
    monkeypatch.setattr(Peak, "device", lambda self: 20)
    peak = Peak(torch.device("cpu"))
    world = Told(3, 4, 1, 2, "cpu")  # the second one of the second of two hosts
    world.said = ((1, 10), (2, 30), (4, 25), None)
    assert pipeline._peaks(peak, world) == (4 + 8, 30)
    world.said = ((1, None), (2, None), (None, None), None)
    monkeypatch.setattr(Peak, "device", lambda self: None)
    assert pipeline._peaks(peak, world) == (8, None)
