"""Hidden states that lie elsewhere than on the device: the same bytes come out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from mixtures import QUICK
from small_models import tiny_model

from zqfp_convert import conversion
from zqfp_convert.calibration.shelf import Shelf
from zqfp_convert.model import device
from zqfp_convert.plan import Place, Plan, make_plan, memory
from zqfp_convert.recipe import Recipe


def planned(out: Path) -> Plan:
    choices = {key: value for key, value in QUICK.items() if key != "device"}
    recipe = Recipe.named("best", **{**choices, "samples": 6, "rank": 2, "rotation": "none"})
    return make_plan(tiny_model(), out, recipe=recipe, device="cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(planned(tmp_path_factory.mktemp("states") / "out"))


def contents(plan: Plan) -> dict[str, bytes]:
    assert plan.states == "device"
    return made(plan)


def made(plan: Plan) -> dict[str, bytes]:
    out = conversion.run(plan).out
    assert not out.with_name(out.name + ".partial").exists()
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


@pytest.mark.parametrize("place", ["host", "file"])
def test_the_same_bytes_wherever_they_lie(
    place: Place, shards: dict[str, bytes], tmp_path: Path
) -> None:
    plan = dataclasses.replace(planned(tmp_path / "out"), states=place)
    assert made(plan) == shards


def test_they_go_to_a_file_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path / "out")
    states = memory.states_bytes(plan)
    short = dataclasses.replace(plan, text=None)
    need = memory.peaks(dataclasses.replace(short, states="file"))[0]
    assert memory.peaks(short)[0] >= need
    monkeypatch.setattr(device, "free_memory", lambda place: need)
    found = planned(tmp_path / "out")
    if memory.peaks(short)[0] > need:
        assert (found.states, found.spilled) == ("file", states)


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
