"""`zqfp-convert tune` as it is typed; what a GPU would measure is given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from architectures import Maker
from typer.testing import CliRunner, Result

from zqfp_convert import tune as room
from zqfp_convert.cli.main import app
from zqfp_convert.runtime.kernels.hopper import schedules, tuning
from zqfp_convert.runtime.kernels.hopper.multiply import Schedule
from zqfp_convert.runtime.kernels.hopper.schedules import Entry


def tune(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["tune", *(str(word) for word in words)])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A Hopper GPU that measures at once; gives where its table is kept."""

    def measure(rows: int, columns: int, tokens: tuple[int, ...]) -> Iterator[Entry]:
        for count in tokens:
            decoded = 3.0 if count < 64 else None
            expanded = 4.0 + 0.1 * count
            yield Entry(rows, columns, count, Schedule(8, stages=8), 5.0, expanded, decoded)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB")
    processors = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: processors)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(room, "hopper_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(tuning, "tune", measure)
    schedules.forget()
    yield tmp_path / "zqfp-convert" / "NVIDIA-H100-80GB.json"
    schedules.forget()


def test_table(gpu: Path) -> None:
    done = tune("--shapes", "4096x14336,96x64", "--tokens", "1", "--tokens", "64,128")
    assert done.exit_code == 0, done.stderr
    words = ("14336", "fused", "for few tokens", "stages 8", "TB/s", "TFLOP/s", gpu.name)
    assert all(word in done.stdout for word in words)
    entries = schedules.read(gpu)
    assert [(e.rows, e.columns, e.tokens) for e in entries] == [
        (96, 64, 1), (96, 64, 64), (96, 64, 128),
        (4096, 14336, 1), (4096, 14336, 64), (4096, 14336, 128)]  # fmt: skip
    assert schedules.choose(64, (96,), 64, 0) == Schedule(8, stages=8)
    assert schedules.decodes(1, (96,), 64, 0, 0)
    assert not schedules.decodes(1, (96,), 64, 9000, 0)  # no room for so many factors
    assert not schedules.decodes(64, (96,), 64, 0, 0)
    assert not [path for path in gpu.parent.iterdir() if path != gpu]


def test_other_shapes_are_kept(gpu: Path) -> None:
    tune("--shapes", "96x64", "--tokens", "1")
    kept = schedules.read(gpu)
    done = tune("--shapes", "128x64", "--tokens", "1", "--json")
    said = json.loads(done.stdout)
    assert said["table"] == str(gpu)
    assert (said["entries"][0]["path"], said["entries"][0]["decodes"]) == ("fused", True)
    assert said["entries"][0]["bytes_per_second"] > 0
    assert schedules.read(gpu)[:1] == kept


def test_shapes_of_checkpoints(gpu: Path, converted: Maker) -> None:
    done = tune(converted("llama"), converted("opt"), "--tokens", "1", "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    shapes = {(entry.rows, entry.columns) for entry in schedules.read(gpu)}
    assert {(64, 64), (32, 64), (172, 64), (64, 172), (160, 64), (64, 160)} <= shapes


def test_shipped_shapes() -> None:
    assert room.wanted_shapes([]) == list(schedules.shipped().shapes)


def test_a_table_that_cannot_be_written(gpu: Path) -> None:
    gpu.parent.write_text("in the way")
    done = tune("--shapes", "96x64", "--tokens", "1")
    assert done.exit_code == 2
    assert "XDG_CACHE_HOME" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shapes", "4096"], "--shapes 4096x14336"),
        (["--shapes", "0x12"], "1 or more"),
        (["--tokens", "0"], "--tokens"),
        (["--tokens", "-1"], "whole numbers"),
    ],
)
def test_options_that_cannot_be(words: list[str], said: str) -> None:
    done = tune(*words)
    assert done.exit_code == 2
    assert said in done.stderr.replace("\n", " ")


def test_without_a_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = tune()
    assert done.exit_code == 2
    for said in ("no GPU", "H100", "NVRTC", "Nothing has to be tuned"):
        assert said in done.stderr.replace("\n", " ")
    for capability, nvrtc, said in (((8, 9), True, "no Hopper GPU"), ((9, 0), False, "no NVRTC")):
        monkeypatch.setattr(room, "resolve_device", lambda device: torch.device("cuda", 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        monkeypatch.setattr(room.hopper, "available", lambda there=nvrtc: there)
        assert said in tune().stderr.replace("\n", " ")
