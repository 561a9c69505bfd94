"""What processes do together, and how they end together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import torch

from zqfp_convert.errors import OptionError
from zqfp_convert.parallel import ALONE, OutOfMemory, World, join

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def meet(world: World) -> None:
    rank, size = world.rank, world.size
    everybody = list(range(size))
    assert world.gather(rank) == everybody
    assert world.broadcast(rank, 1) == 1
    assert world.lead(lambda: rank) == 0
    assert world.agree(lambda: rank) == 0
    assert not world.every(lambda: rank != 1)
    assert world.every(lambda: rank < size)
    assert world.total(0.5) == size / 2
    assert world.sum_(torch.full((2, 3), float(rank))).tolist() == [[float(sum(everybody))] * 3] * 2
    transposed = torch.arange(6.0).view(2, 3).t()
    assert world.sum_(transposed) is transposed
    assert torch.equal(transposed, size * torch.arange(6.0).view(2, 3).t())
    for dtype in (torch.bool, torch.int16, torch.float8_e4m3fn, torch.bfloat16):
        whole = (torch.arange(8 * size * 3 + 5) % 2).to(dtype)[:, None]
        share = world.share(len(whole))
        found = share.gather(whole[share.here])
        assert torch.equal(found.view(torch.uint8), whole.view(torch.uint8))
    assert world.share(8 * size - 1).here == slice(0, 8 * size - 1)  # too few to be handed out
    own = {f"of {rank}": torch.full((rank,), rank, dtype=torch.int16)}
    merged = world.merge(own, torch.device("cpu"))
    assert [(n, t.tolist()) for n, t in merged.items()] == [(f"of {r}", [r] * r) for r in everybody]
    with pytest.raises(OutOfMemory, match=f"process 1 of {size}: none left"), world.attempt():
        if rank == 1:
            raise torch.OutOfMemoryError("none left")
    with pytest.raises(OutOfMemory, match="process 0"):
        world.agree(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))


@pytest.mark.parametrize("size", [2, 3])
def test_meeting(size: int, tmp_path: Path) -> None:
    processes.run(size, meet, tmp_path / "log")


def test_alone() -> None:
    with join("cpu") as world:
        assert (world.rank, world.size, world.device) == (0, 1, "cpu")
    assert ALONE.gather(3) == [3]
    assert ALONE.part(5) == slice(0, 5)
    with pytest.raises(torch.OutOfMemoryError) as raised, ALONE.attempt():
        raise torch.OutOfMemoryError
    assert not isinstance(raised.value, OutOfMemory)


def test_parts_cover_everything() -> None:
    for size in (1, 2, 3, 8):
        for total in (0, 1, 7, 8, 100):
            parts = [World(rank, size).part(total) for rank in range(size)]
            found = [i for part in parts for i in range(total)[part]]
            assert found == list(range(total))


def fails(world: World) -> None:
    if world.rank == 1:
        raise OptionError("here", "something", needed="something else", do="Do it.")
    world.gather(None)


def is_killed(world: World) -> None:
    world.gather(None)
    if world.rank == 1:
        time.sleep(0.7)
        os.kill(os.getpid(), signal.SIGKILL)
    world.sum_(torch.zeros(1))


def breaks(world: World) -> None:
    if world.rank == 0:
        raise ValueError("a fault of the program")
    world.broadcast(None)


def is_busy(world: World) -> None:
    """Process 0 is where it cannot hear of the others."""
    if world.rank == 1:
        fails(world)
    time.sleep(60)


@pytest.mark.parametrize(
    ("work", "codes", "said"),
    [
        (fails, (2, 2), ["process 1 of 2", "here: something; needed: something else."]),
        (is_killed, (2, -signal.SIGKILL), ["process 1 of 2: does not answer any more"]),
        (breaks, (processes.FAILED, 2), ["ValueError: a fault of the program"]),
        (is_busy, (2, 2), ["process 1 of 2", "here: something; needed: something else."]),
    ],
)
def test_all_end_when_one_fails(
    work: Callable[[World], None], codes: tuple[int, int], said: list[str], tmp_path: Path
) -> None:
    began = time.monotonic()
    started = processes.start(2, work, tmp_path / "log")
    assert tuple(processes.wait(started, 20)) == codes
    assert time.monotonic() - began < 12
    told = (tmp_path / "log.0").read_text()
    for words in said:
        assert words in told
    other = (tmp_path / "log.1").read_text()
    assert other.count("Error") == (1 if work in (fails, is_busy) else 0), other


def waits(world: World) -> None:
    world.gather(None)
    (Path(os.environ["HERE"]) / str(world.rank)).touch()
    if world.rank != 1 and "MEET" in os.environ:
        world.gather(None)
    time.sleep(60)


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.parametrize("meet", [True, False])
def test_told_to_end(
    killed: bool, meet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun does with all once one has died, and a scheduler does when time is over.

    Whether they are busy, or wait for the one that has died and find that out by themselves.
    """
    monkeypatch.setenv("HERE", str(tmp_path))
    if meet:
        monkeypatch.setenv("MEET", "1")
    started = processes.start(3, waits, tmp_path / "log")
    until = time.monotonic() + 30
    while not all((tmp_path / str(rank)).exists() for rank in range(3)):
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(1.2)  # signs of life
    began = time.monotonic()
    if killed:
        os.kill(started[1], signal.SIGKILL)
        time.sleep(0.1)
    for rank in (0, 2) if killed else (0, 1, 2):
        os.kill(started[rank], signal.SIGTERM)
    assert processes.wait(started, 20) == [2, -signal.SIGKILL if killed else 2, 2]
    assert time.monotonic() - began < 10  # torchrun kills after 30
    said = [(tmp_path / f"log.{rank}").read_text() for rank in range(3)]
    why = "process 1 of 3: does not answer any more" if killed else "process 0 of 3"
    assert f"Error: {why}" in said[0]
    assert said[0].count("Error: ") == 1, said[0]
    assert "goes on from what is done" in said[0]
    if not killed:
        assert "was told to end (SIGTERM)" in said[0]
        for other in said[1:]:  # gloo's own lines come with some versions
            assert [line for line in other.splitlines() if not line.startswith("[Gloo]")] == []
