"""A conversion that was stopped goes on, and makes the bytes of one that was not."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import typer
from architectures import QUICK, Maker, write_model, write_tokenizer
from dequantized import read_tensors
from safetensors.torch import save_file

import zqfp_convert
from zqfp_convert.checkpoint.output.journal import Journal
from zqfp_convert.checkpoint.source.source import Source
from zqfp_convert.cli import main
from zqfp_convert.conversion import identity, pipeline, work
from zqfp_convert.conversion.work import Work
from zqfp_convert.errors import CheckpointError, OutputError, SourceError, Stopped

HERE = Path(__file__).parent
FEW: dict[str, Any] = {**QUICK, "samples": 6, "rank": 2, "sweeps": 1}


def convert(model: Path, out: Path, **choices: Any) -> zqfp_convert.Conversion:
    return zqfp_convert.convert(model, out, **{**FEW, **choices})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def at_once(tiny_model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`at_once(arch, recipe)` is what a conversion makes that nothing happens to."""

    @functools.cache
    def make(arch: str, recipe: str) -> dict[str, bytes]:
        out = tmp_path_factory.mktemp("at-once") / "out"
        convert(tiny_model(arch), out, recipe=recipe)
        return contents(out)

    return make


def journal(out: Path) -> list[dict[str, Any]]:
    opened = Journal(out.with_name(out.name + ".partial") / "journal")
    opened.close()
    return opened.records


def stop_at(words: str) -> Callable[[str, int, int], None]:
    """Ctrl-C where so much is told, or, with a full stop, that and no more."""

    def progress(text: str, done: int, total: int) -> None:
        if f"{text}.".startswith(words):
            raise KeyboardInterrupt

    return progress


def stopped(model: Path, out: Path, at: str = "block 2", **choices: Any) -> None:
    with pytest.raises(Stopped, match="goes on from there"):
        convert(model, out, progress=stop_at(at), **choices)


def program(folder: Path, *arguments: str, within: tuple[str, ...] = ()) -> str:
    paths = [str(HERE.parent), str(HERE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [*within, sys.executable, str(HERE / "killed.py"), str(folder), *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Also while tuning, and where batches were too large for the memory."""
    print(program(tmp_path, "--best", "20", "--little-memory", "5", "--max", "3"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_file_that_cannot_grow(tmp_path: Path) -> None:
    """What a quota does, without being root."""
    said = program(tmp_path, "--fill-disk", "--limit", "8192")
    assert "the disk is full" in said
    assert "What is done is kept" in said
    assert "goes on from there" in said


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """A real one, of memory, in a namespace of its own where the system allows that."""
    mount = 'mount -t tmpfs -o size=96m none "$0" && exec "$@"'
    within = ("unshare", "-Urm", "sh", "-c", mount, str(tmp_path))
    if shutil.which("unshare") is None or subprocess.run([*within, "true"], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    said = program(tmp_path, "--fill-disk", within=within)
    assert "the disk is full" in said


@pytest.mark.parametrize(
    ("recipe", "at", "kept"),
    [
        ("fast", "checking", False),
        ("fast", "block 2", True),
        ("fast", "writing.", True),
        ("best", "checking", False),
        ("best", "writing calibration", False),
        ("best", "block 1", True),  # the text
        ("best", "block 2", True),
        ("best", "writing.", True),
    ],
)
def test_interrupted(
    recipe: str,
    at: str,
    kept: bool,
    tiny_model: Maker,
    at_once: Callable[..., Any],
    tmp_path: Path,
) -> None:
    out, model = tmp_path / "out", tiny_model("gpt2")
    with pytest.raises(KeyboardInterrupt) as raised:
        convert(model, out, recipe=recipe, progress=stop_at(at))
    assert raised.errisinstance(Stopped) is kept
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"] * kept
    convert(model, out, recipe=recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(out) == at_once("gpt2", recipe)


@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_a_source_that_is_damaged_on_the_way(recipe: str, tmp_path: Path) -> None:
    """Hours of work are not thrown away for a file that can be downloaded again."""
    model, out = write_model(tmp_path / "model", num_hidden_layers=4), tmp_path / "out"
    write_tokenizer(model)
    shard = model / "model.safetensors"
    whole = shard.read_bytes()

    def cut_off(text: str, done: int, total: int) -> None:
        if text.startswith("block 2/4") and shard.stat().st_size == len(whole):
            os.truncate(shard, 1000)

    with pytest.raises(CheckpointError, match="bad-shard") as raised:
        convert(model, out, recipe=recipe, progress=cut_off)
    assert f"is kept in {out}.partial" in raised.value.do
    assert "the same command goes on from there" in str(raised.value)
    blocks = [record for record in journal(out) if record.get("about")]
    assert 1 <= len(blocks) < 4
    shard.write_bytes(whole)
    said: list[str] = []
    convert(model, out, recipe=recipe, progress=lambda text, *rest: said.append(text))
    assert not [text for text in said if text.startswith("block 1/4  self_attn")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    convert(model, tmp_path / "at-once", recipe=recipe)
    assert contents(out) == contents(tmp_path / "at-once")


def test_what_is_done_is_not_done_again(
    tiny_model: Maker,
    at_once: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped(tiny_model(), tmp_path / "out")
    said: list[str] = []
    monkeypatch.setattr(work, "find_windows", _fails_if_new(work.find_windows))
    result = convert(
        tiny_model(), tmp_path / "out", progress=lambda text, done, total: said.append(text)
    )
    assert "block 1/2  done before" in said
    assert not [text for text in said if text.startswith("block 1/2  self_attn")]
    assert len(result.layers) == 14
    monkeypatch.undo()
    assert contents(tmp_path / "out") == at_once("llama", "best")


def _fails_if_new(real: Callable[..., Any]) -> Callable[..., Any]:
    def find(plan: Any, partial: Any, report: Any) -> Any:
        assert partial.is_whole("text.safetensors")
        return real(plan, partial, report)

    return find


def change_recipe(model: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"rank": 4, "group_size": 64}


def change_calibration(model: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    text = model.parent / "text.txt"
    text.write_text("Other words. " * 100)
    return {"calibration": text}


def change_weights(model: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    tensors = read_tensors(model)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return {}


def change_shapes(model: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    tensors = read_tensors(model)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return {}


def change_config(model: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    return {}


def change_file(model: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    (model / "LICENSE").write_text("new terms")
    return {}


def change_program(model: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(identity, "__version__", "99.0")
    return {}


def change_torch(model: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(identity, "torch", SimpleNamespace(__version__="1.0"))
    return {}


def change_transformers(model: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(identity, "transformers", SimpleNamespace(__version__="1.0"))
    return {}


def change_device(model: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(identity, "describe", lambda device: "NVIDIA H200")
    return {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_recipe, ["recipe: group_size was 32, is 64; recipe: rank was 2, is 4"]),
        (change_calibration, ["calibration was self-generated, is text.txt with the hash "]),
        (change_weights, ["the model's weights are not what they were"]),
        (change_shapes, ["tensors: model.norm.weight was F32 [64], is F16 [64]"]),
        (change_config, ["model: config.json is another"]),
        (change_file, ["model: LICENSE has come since"]),
        (change_program, ["zqfp-convert was ", "is 99.0"]),
        (change_torch, [f"torch was {torch.__version__}, is 1.0"]),
        (change_transformers, [f"transformers was {transformers.__version__}, is 1.0"]),
        (change_device, ["device was cpu (", "is NVIDIA H200"]),
    ],
)
def test_another_conversion_is_refused(
    change: Callable[[Path, pytest.MonkeyPatch], dict[str, Any]],
    words: list[str],
    tiny_model: Maker,
    tmp_path: Path,
) -> None:
    model, out = Path(shutil.copytree(tiny_model(), tmp_path / "model")), tmp_path / "out"
    stopped(model, out)
    before = contents(tmp_path / "out.partial")
    with pytest.MonkeyPatch.context() as patch:
        choices = change(model, patch)
        with pytest.raises(OutputError) as raised:
            convert(model, out, **choices)
        assert raised.value.where == str(tmp_path / "out.partial")
        for part in words:
            assert part in raised.value.found
        assert "--no-resume" in raised.value.do
        assert contents(tmp_path / "out.partial") == before
        if change in (change_recipe, change_weights):
            convert(model, out, resume=False, **choices)
            assert not (tmp_path / "out.partial").exists()


def test_a_file_that_has_come_is_moved_away(tiny_model: Maker, tmp_path: Path) -> None:
    """As the error advises."""
    model, out = Path(shutil.copytree(tiny_model(), tmp_path / "model")), tmp_path / "out"
    stopped(model, out, recipe="fast")
    (model / "nohup.out").write_text("said")
    with pytest.raises(OutputError, match=r"model: nohup\.out has come since.*move away files"):
        convert(model, out, recipe="fast")
    (model / "nohup.out").unlink()
    convert(model, out, recipe="fast")
    convert(model, tmp_path / "at-once", recipe="fast")
    assert contents(out) == contents(tmp_path / "at-once")


def test_a_machine_that_computes_something_else(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tiny_model(), tmp_path / "out")
    real = work.fold

    def fold(plan: Any, index: int, block: torch.nn.Module, *rest: Any) -> Any:
        next(block.parameters()).data.mul_(1 + 2**-20)
        return real(plan, index, block, *rest)

    monkeypatch.setattr(work, "fold", fold)
    with pytest.raises(OutputError, match="behind block 1 this machine computes other") as raised:
        convert(tiny_model(), tmp_path / "out")
    assert "--no-resume" in raised.value.do
    monkeypatch.undo()
    convert(tiny_model(), tmp_path / "out")


@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_a_last_line_that_was_cut_off(
    recipe: str, tiny_model: Maker, at_once: Callable[..., Any], tmp_path: Path
) -> None:
    """Its block is computed again."""
    out = tmp_path / "out"
    stopped(tiny_model(), out, "writing.", recipe=recipe)
    lines = tmp_path / "out.partial" / "journal"
    whole = lines.read_bytes()
    lines.write_bytes(whole[:-100])
    assert len(journal(out)) == whole.count(b"\n") - 1
    convert(tiny_model(), out, recipe=recipe)
    assert contents(out) == at_once("llama", recipe)


def test_batches_shrink_where_memory_ends(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    real = Work._block

    def block(self: Work, index: int, tensors: dict[str, torch.Tensor]) -> Any:
        assert self.states is not None
        sizes.append((index, len(self.states.student.hidden[0])))
        if sizes[-1][1] > (4, 1)[index]:
            raise torch.OutOfMemoryError("too much")
        return real(self, index, tensors)

    monkeypatch.setattr(Work, "_block", block)
    stopped(tiny_model(), tmp_path / "out", "writing.")
    assert sizes == [(0, 6), (0, 3), (1, 3), (1, 1)]
    noted = [record["value"] for record in journal(tmp_path / "out") if "batch" in record.values()]
    assert noted == [
        {"block": 0, "windows": 6}, {"block": 0, "windows": 3}, {"block": 1, "windows": 1}
    ]  # fmt: skip
    convert(tiny_model(), tmp_path / "out")
    monkeypatch.setattr(Work, "_block", lambda *rest: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(SourceError, match="memory of cpu"):  # not even one window fits
        convert(tiny_model(), tmp_path / "other")


def test_what_norms_compute_is_found_out_once(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another batch, as where memory has ended in the first block, might say something else."""
    tried, fused = [], []

    def find_forms(block: torch.nn.Module, call: object, hidden: torch.Tensor) -> dict[str, Any]:
        tried.append(len(hidden))
        return dict.fromkeys(work.kinds(block), "once" if len(hidden) > 3 else "twice")

    real = work.trace

    def trace(*args: Any) -> Any:
        if len(args[3]) > 3:
            raise torch.OutOfMemoryError("too much")
        return real(*args)

    monkeypatch.setattr(work, "find_forms", find_forms)
    monkeypatch.setattr(work, "fuse_norms", lambda block, forms: fused.extend(forms.values()))
    monkeypatch.setattr(work, "trace", trace)
    stopped(tiny_model(), tmp_path / "out")
    assert tried == [6]
    convert(tiny_model(), tmp_path / "out")
    assert tried == [6]
    assert set(fused) == {"once"}


def test_what_a_later_block_shows_of_norms_changes_nothing(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = iter(["twice", "once"])
    classes: list[set[str]] = []
    fused: list[dict[str, str | None]] = []

    def kinds(block: torch.nn.Module) -> set[str]:
        classes.append({"first"} if not fused else {"first", "second"})
        return classes[-1]

    def find_forms(*args: object) -> dict[str, str]:
        return dict.fromkeys(classes[-1], next(forms))

    monkeypatch.setattr(work, "kinds", kinds)
    monkeypatch.setattr(work, "find_forms", find_forms)
    monkeypatch.setattr(work, "fuse_norms", lambda block, forms: fused.append(dict(forms)))
    stopped(tiny_model(), tmp_path / "out", "writing.")
    assert fused == [{"first": "twice"}, {"first": "twice", "second": "once"}]
    noted = [record["value"] for record in journal(tmp_path / "out") if "norms" in record.values()]
    assert noted == [{"first": "twice"}, {"second": "once"}]


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (KeyboardInterrupt(), False),
        (OutputError("", "", needed="", do=""), False),
        (ZeroDivisionError(), False),
        (SourceError("", "", needed="", do=""), True),  # a NaN there may be the cause
    ],
)
def test_who_waits_for_the_check_of_all_weights(
    error: BaseException,
    waits: bool,
    tiny_model: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[bool] = []

    def check_finite(self: Source, names: list[str], stopped: Event) -> dict[str, int]:
        told.append(stopped.wait(2.0 if waits else 60.0))
        return {}

    def progress(text: str, done: int, total: int) -> None:
        if text.startswith("writing calibration"):
            raise error

    monkeypatch.setattr(Source, "check_finite", check_finite)
    with pytest.raises(type(error)):
        convert(tiny_model(), tmp_path / "out", progress=progress)
    assert told == [not waits]


def test_what_the_writing_thread_meets_is_raised(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.Partial, "save", lambda *rest: (_ for _ in ()).throw(OSError("!")))
    with pytest.raises(OSError, match="!"):
        convert(tiny_model(), tmp_path / "out", recipe="fast")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("worked", [True, False])
def test_the_command_says_what_a_fault_has_left(
    worked: bool, tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a file system that is gone for a moment."""
    from typer.testing import CliRunner

    out, real = tmp_path / "out", Work.blocks
    words = [str(tiny_model()), str(out), "--recipe", "fast", "--device", "cpu"]

    def fail(*rest: Any) -> Any:
        raise OSError(5, "Input/output error")

    def blocks(self: Work, files: Any, first: int) -> Any:
        yield next(real(self, files, first))
        files.wait()
        fail()

    monkeypatch.setattr(*((Work, "blocks", blocks) if worked else (pipeline, "warm", fail)))
    done = CliRunner().invoke(main.app, main.arguments(words))
    assert done.exit_code == 1
    told = done.stderr.splitlines()[-1]
    assert "the system refuses: [Errno 5] Input/output error." in told
    kept = f"What is done is kept in {out}.partial: the same command goes on from there."
    assert told.endswith(kept) is worked
    assert Path(f"{out}.partial").exists() is worked


def test_the_command_says_how_to_go_on(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "an out"
    words = [str(tiny_model()), str(out), "--recipe", "fast", "--device", "cpu"]
    real = Work.blocks

    def blocks(self: Work, *rest: Any) -> Any:
        for number, block in enumerate(real(self, *rest)):
            if number == 1:
                raise KeyboardInterrupt
            yield block

    from typer.testing import CliRunner

    monkeypatch.setattr(Work, "blocks", blocks)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/zqfp-convert", *words, "--no-resume"])
    command: typer.Typer = main.app
    done = CliRunner().invoke(command, main.arguments([*words, "--no-resume"]))
    assert done.exit_code == 130
    told = done.stderr.splitlines()
    assert str(tmp_path / "an out.partial") in told[-2]
    assert told[-1].strip() == f"zqfp-convert {words[0]} '{out}' --recipe fast --device cpu"
    monkeypatch.undo()
    done = CliRunner().invoke(command, main.arguments([*words, "--rank", "2"]))
    assert done.exit_code == 2
    assert "recipe: rank was 0, is 2" in done.stderr
    assert CliRunner().invoke(command, main.arguments(words)).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["an out"]
