"""Hidden states that lie elsewhere than on the device: the same bytes come out."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from architectures import QUICK, Maker

from zqfp_convert import conversion
from zqfp_convert.calibration.shelf import Shelf
from zqfp_convert.checkpoint.output import partial
from zqfp_convert.errors import OutputError, SourceError
from zqfp_convert.model import device
from zqfp_convert.plan import Place, Plan, make_plan, memory
from zqfp_convert.plan.disk import output_bytes
from zqfp_convert.recipe import Recipe


@pytest.fixture
def planned(tiny_model: Maker, tmp_path: Path) -> Callable[..., Plan]:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 400)

    def plan(out: str, samples: int = 6) -> Plan:
        choices = {**QUICK, "samples": samples, "rank": 2, "rotation": "none"}
        device = choices.pop("device")
        recipe = Recipe.named("best", **choices)
        return make_plan(
            tiny_model(), tmp_path / out, recipe=recipe, calibration=text, device=device
        )

    return plan


def test_the_same_bytes_wherever_they_lie(planned: Callable[..., Plan]) -> None:
    places: list[Place] = ["device", "host", "file"]
    made = []
    for place in places:
        out = conversion.run(dataclasses.replace(planned(place), states=place)).out
        assert not out.with_name(out.name + ".partial").exists()
        made.append({path.name: path.read_bytes() for path in out.glob("*.safetensors")})
    assert made[0] == made[1] == made[2]


def test_they_go_to_a_file_where_memory_is_short(
    planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned("out", 200)
    assert (plan.states, plan.spilled) == ("device", 0)
    need = memory.peaks(dataclasses.replace(plan, states="file"))[0]
    assert need == plan.host_memory - memory.states_bytes(plan)
    monkeypatch.setattr(device, "free_memory", lambda place: need)
    short = planned("out", 200)
    assert (short.states, short.spilled) == ("file", memory.states_bytes(plan))
    assert short.host_memory == need
    monkeypatch.setattr(device, "free_memory", lambda place: need - 1)
    with pytest.raises(SourceError, match="memory of cpu"):
        planned("out", 200)


def test_a_disk_that_has_no_room_for_them_either(
    planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned("out", 200)
    need = memory.peaks(dataclasses.replace(plan, states="file"))[0]
    monkeypatch.setattr(device, "free_memory", lambda place: need)
    spilled = memory.states_bytes(plan)
    enough = output_bytes(plan) + spilled
    for free in (enough, enough - 1):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(partial.shutil, "disk_usage", lambda place, usage=usage: usage)
        if free == enough:
            assert planned("out", 200).spilled == spilled
            continue
        with pytest.raises(OutputError) as raised:
            planned("out", 200)
    assert f"of it {spilled / 1e6:,.0f} MB for hidden states" in raised.value.needed
    assert "(200 x 32 tokens)" in raised.value.needed
    assert raised.value.do.startswith("Use fewer --samples or a shorter --seq-len. Make room")
    monkeypatch.setattr(device, "free_memory", lambda place: 1 << 40)
    assert planned("out", 200).spilled == 0  # in memory, there is room for them
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda place: SimpleNamespace(free=0))
    with pytest.raises(OutputError) as raised:
        planned("out", 200)
    assert "--samples" not in str(raised.value)


@pytest.mark.parametrize("in_file", [False, True])
def test_a_shelf_is_a_list_of_tensors(in_file: bool, tmp_path: Path) -> None:
    shelf = Shelf(torch.device("cpu"), tmp_path / "states" if in_file else None)
    values = [torch.randn(3, 4, 5, dtype=torch.bfloat16), torch.randn(2, 4, 5).bfloat16()]
    for value in values:
        shelf.append(value)
    assert [torch.equal(a, b) for a, b in zip(shelf, values, strict=True)] == [True, True]
    shelf[0] = values[0] = values[0] + 1
    shelf.split(2, 0)
    parts = [values[0][:2], values[0][2:], values[1]]
    assert [torch.equal(a, b) for a, b in zip(shelf, parts, strict=True)] == [True] * 3
    shelf[1] = parts[1] * 2
    assert torch.equal(shelf[1], parts[1] * 2)
    assert torch.equal(shelf[0], parts[0])
    if in_file:
        assert (tmp_path / "states").stat().st_size == 2 * 100


@pytest.mark.parametrize("asked", [True, False])
def test_a_file_takes_its_room_at_once(
    asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file system cannot be asked for it."""

    def refuse(*rest: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    if not asked:
        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    shelf = Shelf(torch.device("cpu"), tmp_path / "states")
    values = torch.randn(2, 3, 50_000)
    rooms = []
    for number, value in enumerate(values, 1):
        rooms.append(shelf._room(value))
        found = (tmp_path / "states").stat()
        assert found.st_size == number * value.nbytes
        assert found.st_blocks * 512 >= found.st_size
    for room, value in zip(rooms, values, strict=True):
        room.copy_(value)
    assert torch.equal(torch.stack(rooms), values)


FILL = """
import sys
from pathlib import Path
import torch
from zqfp_convert.calibration.shelf import Shelf
from zqfp_convert.errors import OutputError

shelf, part = Shelf(torch.device("cpu"), Path(sys.argv[1]) / "states"), torch.ones(1 << 18)
try:
    for _ in range(100):
        shelf.append(part)
except OutputError as error:
    assert all(torch.equal(one, part) for one in shelf)
    print(len(shelf), error)
"""


def test_a_disk_too_small_for_them(tmp_path: Path) -> None:
    """A real one, of memory, in a namespace of its own where the system allows that."""
    mount = 'mount -t tmpfs -o size=8m none "$0" && exec "$@"'
    within = ["unshare", "-Urm", "sh", "-c", mount, str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*within, "true"], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    done = subprocess.run(
        [*within, sys.executable, "-c", FILL, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    count, where = done.stdout.split(maxsplit=1)
    assert int(count) == 8  # of 1 MiB each
    assert where.startswith(f"{tmp_path / 'states'}: the disk is full")
    assert "Make room" in where
