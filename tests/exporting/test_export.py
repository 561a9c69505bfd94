"""What all exports share: what is refused, what is left behind, and the command."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from exported_models import Packer
from typer.testing import CliRunner

import zqfp_convert
from zqfp_convert.cli.main import app
from zqfp_convert.errors import CheckpointError, OptionError, OutputError, Stopped
from zqfp_convert.exporting import TARGETS


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("to", TARGETS)
def test_a_destination_that_exists(packed: Packer, tmp_path: Path, to: str) -> None:
    with pytest.raises(OutputError, match="exists; needed: a new folder"):
        zqfp_convert.export(packed("demo"), tmp_path, to)


def test_a_destination_within_the_checkpoint(packed: Packer) -> None:
    with pytest.raises(OutputError, match="lies in the checkpoint"):
        zqfp_convert.export(packed("demo"), packed("demo") / "dest")


def test_an_unknown_format(packed: Packer, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="one of compressed-tensors, bf16, gguf"):
        zqfp_convert.export(packed("demo"), tmp_path / "dest", "awq")


@pytest.mark.parametrize("to", TARGETS)
def test_a_damaged_shard(packed: Packer, tmp_path: Path, to: str) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in packed("demo").iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    shard = sorted(damaged.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="shard-hash"):
        zqfp_convert.export(damaged, tmp_path / "dest", to)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize("to", ["compressed-tensors", "bf16"])
def test_a_stopped_export_goes_on(
    packed: Packer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    checkpoint = packed("demo", rank=2)
    monkeypatch.setattr("zqfp_convert.exporting.folder.SHARD", 50_000)
    zqfp_convert.export(checkpoint, tmp_path / "whole", to)
    seen: list[str] = []

    def stop(name: str, done: int, total: int) -> None:
        seen.append(name)
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(Stopped, match="the same export goes on"):
        zqfp_convert.export(checkpoint, tmp_path / "dest", to, progress=stop)
    assert not (tmp_path / "dest").exists()
    other = next(target for target in ("compressed-tensors", "bf16") if target != to)
    with pytest.raises(OutputError, match="an unfinished conversion that differs: export was"):
        zqfp_convert.export(checkpoint, tmp_path / "dest", other)
    again: list[str] = []
    zqfp_convert.export(checkpoint, tmp_path / "dest", to, progress=lambda n, *_: again.append(n))
    assert len(again) < len(seen) + 5
    assert digests(tmp_path / "dest") == digests(tmp_path / "whole")
    assert not (tmp_path / "dest.partial").exists()


@pytest.mark.parametrize("to", TARGETS)
def test_too_little_room(
    packed: Packer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    checkpoint = packed("demo")  # while there is room
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"0 MB of free disk space; needed: [67][0-9] MB"):
        zqfp_convert.export(checkpoint, tmp_path / "dest", to)
    assert not list(tmp_path.iterdir())


def test_the_command(packed: Packer, tmp_path: Path) -> None:
    checkpoint = packed("demo", rank=2)
    run = CliRunner().invoke
    shown = run(app, ["export", str(checkpoint), str(tmp_path / "a"), "--to", "compressed-tensors"])
    assert shown.exit_code == 0
    words = " ".join(shown.output.split())
    assert "Exported 28 layers" in words
    assert "a LoRA adapter, which has to be loaded too" in words
    printed = run(app, ["export", str(checkpoint), str(tmp_path / "b"), "--to", "bf16", "--json"])
    assert json.loads(printed.stdout)["to"] == "bf16"
    refused = run(app, ["export", str(checkpoint), str(tmp_path / "b"), "--to", "bf16"])
    assert refused.exit_code == 2
    assert "exists" in refused.output
