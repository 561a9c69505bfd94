"""Writing a checkpoint: nothing half-written is ever seen under its final name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from dequantized import manifest, read_tensors
from safetensors import SafetensorError

from zqfp_convert.checkpoint.output import partial
from zqfp_convert.checkpoint.output.disk import sha256
from zqfp_convert.checkpoint.output.partial import Partial, check_free, differences
from zqfp_convert.checkpoint.output.writer import Writer
from zqfp_convert.errors import OptionError, OutputError

A = {"a": torch.arange(6.0).view(2, 3)}
B = {"b": torch.ones(4, dtype=torch.uint8), "c": torch.zeros(3, 2, dtype=torch.bfloat16).t()}
LAYERS = {"x": {"shape": [2, 3]}}


@contextmanager
def writing(out: Path, shards: int, **options: bool) -> Iterator[Writer]:
    with Partial(out, {"of": "tensors"}, **options) as begun, Writer(begun, shards) as target:
        yield target


def write(out: Path, *shards: dict[str, torch.Tensor], overwrite: bool = False) -> Path:
    with writing(out, len(shards), overwrite=overwrite) as target:
        for tensors in shards[target.shards.done :]:
            target.add_shard(tensors)
            assert not out.exists() or overwrite
        target.finish({"model_type": "Größe"}, LAYERS, {"a": "bias_added"})
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_shard(tmp_path: Path) -> None:
    out = write(tmp_path / "out", A)
    assert files(out).keys() == {"model.safetensors", "config.json", "zqfp_manifest.json"}
    assert torch.equal(read_tensors(out)["a"], A["a"])
    notes = manifest(out)
    assert notes["format"] == "zqfp"
    assert notes["format_version"] == 1
    assert notes["layers"] == LAYERS
    assert notes["changed"] == {"a": "bias_added"}
    data = (out / "model.safetensors").read_bytes()
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert notes["shards"] == {"model.safetensors": entry}
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["model_type"] == "Größe"
    assert list(tmp_path.iterdir()) == [out]


def test_two_shards(tmp_path: Path) -> None:
    out = write(tmp_path / "deep" / "down" / "out", A, B)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert list(manifest(out)["shards"]) == names
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": names[0], "b": names[1], "c": names[1]}
    assert index["metadata"]["total_size"] == 24 + 4 + 12
    assert torch.equal(read_tensors(out)["c"], B["c"])


def test_same_bytes_twice(tmp_path: Path) -> None:
    assert files(write(tmp_path / "one", A, B)) == files(write(tmp_path / "two", A, B))


def test_copies_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "LICENSE").write_bytes(b"terms\r\n\xff")
    (source / "sub" / "code.py").write_text("x = 1")
    with writing(tmp_path / "out", 1) as target:
        target.add_shard(A)
        target.copy(source, [Path("LICENSE"), Path("sub/code.py")])
        target.finish({}, {}, {})
    assert (tmp_path / "out" / "LICENSE").read_bytes() == b"terms\r\n\xff"
    assert (tmp_path / "out" / "sub" / "code.py").read_text() == "x = 1"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_one_is_gone_on_with(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), writing(tmp_path / "out", 2) as target:
        target.add_shard(A)
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    with pytest.raises(error), writing(tmp_path / "out", 2) as target:
        assert target.shards.done == 1
        raise error
    write(tmp_path / "out", A, B)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert files(tmp_path / "out") == files(write(tmp_path / "at once", A, B))


@pytest.mark.parametrize("shards", [0, 1])
def test_where_there_is_nothing_to_go_on_with_nothing_is_left(shards: int, tmp_path: Path) -> None:
    """Nothing was done, or the user has made a mistake that the same run would meet again."""
    error: BaseException = (
        KeyboardInterrupt() if shards == 0 else OptionError("", "", needed="", do="")
    )
    with pytest.raises(type(error)), writing(tmp_path / "out", 2) as target:
        for _ in range(shards):
            target.add_shard(A)
        raise error
    assert not list(tmp_path.iterdir())


def test_work_is_kept_whatever_happens(tmp_path: Path) -> None:
    error = OptionError("here", "this", needed="that", do="Do so.")
    with pytest.raises(OptionError) as raised, writing(tmp_path / "out", 2) as target:
        target.add_shard(A, {"entries": {}})
        raise error
    kept = f"What is done is kept in {tmp_path / 'out'}.partial: when that is put right, the same "
    assert raised.value.do == f"Do so. {kept}command goes on from there."
    assert str(raised.value) == f"here: this; needed: that. {raised.value.do}"
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "out", 2) as target:
        assert target.shards.done == 1
        raise KeyboardInterrupt


def test_an_unfinished_one_leaves_nothing(tmp_path: Path) -> None:
    with writing(tmp_path / "out", 2) as target:
        target.add_shard(A)
    assert not list(tmp_path.iterdir())


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    # what safetensors makes of the same
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_file(*args: object, **kwargs: object) -> None:
        raise error

    with (
        pytest.raises(OutputError, match="disk is full") as raised,
        writing(tmp_path / "out", 2) as target,
    ):
        target.add_shard(A)
        target.shards.wait()
        monkeypatch.setattr(partial, "save_file", save_file)
        target.add_shard(B)  # in a thread: it is seen when the next thing is written
        target.finish({}, {}, {})
    assert raised.value.where == str(tmp_path / "out")
    assert "Make room" in raised.value.do
    assert "goes on" in raised.value.do
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    write(tmp_path / "out", A, B)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.EACCES, "Allow that"), (errno.EIO, "Look at the disk")]
)
@pytest.mark.parametrize("kept", [True, False])
def test_what_else_the_system_says(
    kept: bool, code: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whether there is something to go on with."""

    def save_file(*args: object, **kwargs: object) -> None:
        raise OSError(code, "said the system")

    with (
        pytest.raises(OutputError, match="said the system") as raised,
        writing(tmp_path / "out", 2) as target,
    ):
        if kept:
            target.add_shard(A)
            target.shards.wait()
        monkeypatch.setattr(partial, "save_file", save_file)
        target.add_shard(B)
        target.shards.wait()
    assert advice in raised.value.do
    assert "Make room" not in raised.value.do
    assert (tmp_path / "out.partial").exists() is kept
    assert ("goes on from there" in raised.value.do) is kept


@pytest.mark.parametrize("step", ["rename", "json"])
def test_a_failure_at_the_very_end(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves nothing under the final name, and the next try goes on from there."""

    def fail(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "no")

    with monkeypatch.context() as patch:
        if step == "rename":
            patch.setattr(Path, "rename", fail)
        else:
            patch.setattr(Writer, "_write_json", fail)
        with pytest.raises((OSError, OutputError)):
            write(tmp_path / "out", A)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    write(tmp_path / "out", A)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    out = write(tmp_path / "out", A)
    before = files(out)
    with pytest.raises(OutputError, match="exists") as raised:
        write(out, B)
    assert raised.value.where == str(out)
    assert "--overwrite" in raised.value.do
    assert files(out) == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match="exists"):
        check_free(tmp_path / "empty", overwrite=False)


def test_overwriting(tmp_path: Path) -> None:
    out = write(tmp_path / "out", A)
    write(out, B, overwrite=True)
    assert read_tensors(out).keys() == B.keys()
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", A, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


def test_what_is_to_be_overwritten_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = write(tmp_path / "out", A)
    before = files(out)
    with pytest.raises(ValueError, match="stop"), writing(out, 2, overwrite=True) as target:
        target.add_shard(B)
        assert files(out) == before
        raise ValueError("stop")
    assert files(out) == before
    write(out, B, A, overwrite=True)
    assert read_tensors(out).keys() == B.keys() | A.keys()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("resume", [True, False])
def test_killed_between_the_two_renames(
    resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was to be replaced has lost its name then, and the new one has not got it yet."""
    out = write(tmp_path / "out", A)
    before = files(out)
    rename = Path.rename

    def die(self: Path, target: Path) -> Path:
        if self.name == partial.CHECKPOINT:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", die)
        write(out, B, overwrite=True)
    assert not out.exists()
    if resume:
        write(out, B)
        assert read_tensors(out).keys() == B.keys()
        assert list(tmp_path.iterdir()) == [out]
    else:
        with pytest.raises(OutputError, match="exists"), Partial(out, resume=False):
            pass
        assert files(out) == before


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_not_ours_is_never_overwritten(kind: str, tmp_path: Path) -> None:
    out, precious = tmp_path / "out", tmp_path / "precious"
    if kind == "link":
        write(precious, A)
        out.symlink_to(precious)
    elif kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "precious").write_text("mine")
    with pytest.raises(OutputError, match="not a zqfp checkpoint") as raised:
        write(out, A, overwrite=True)
    assert raised.value.where == str(out)
    assert not (tmp_path / "out.partial").exists()
    assert out.exists()


def test_a_neighbour_called_old_is_left_alone(tmp_path: Path) -> None:
    out = write(tmp_path / "out", A)
    neighbour = tmp_path / "out.old"
    neighbour.mkdir()
    (neighbour / "precious").write_text("mine")
    write(out, B, overwrite=True)
    assert read_tensors(out).keys() == B.keys()
    assert (neighbour / "precious").read_text() == "mine"
    assert not (tmp_path / "out.partial").exists()


def interrupted(out: Path) -> Path:
    """The shard that an interrupted writing of A and B has left."""
    with pytest.raises(KeyboardInterrupt), writing(out, 2) as target:
        target.add_shard(A)
        raise KeyboardInterrupt
    return out.with_name("out.partial") / "checkpoint" / "model-00001-of-00002.safetensors"


def test_an_earlier_partial_folder_is_thrown_away_on_request(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert interrupted(out).exists()
    with Partial(out, resume=False) as begun, Writer(begun, 1) as target:
        assert target.shards.done == 0
        target.add_shard(B)
        target.finish({}, {}, {})
    assert read_tensors(out).keys() == B.keys()
    assert list(tmp_path.iterdir()) == [out]


def test_an_empty_partial_folder_is_no_obstacle(tmp_path: Path) -> None:
    """A run may be killed before it has written anything into it."""
    (tmp_path / "out.partial").mkdir()
    write(tmp_path / "out", A)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("harm", ["cut off", "changed", "gone"])
def test_a_file_that_is_not_what_the_journal_says_is_written_again(
    harm: str, tmp_path: Path
) -> None:
    shard = interrupted(tmp_path / "out")
    data = shard.read_bytes()
    shard.unlink()
    if harm != "gone":
        shard.write_bytes(data[:-1] if harm == "cut off" else data[:-1] + b"?")
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "out", 2) as target:
        assert target.shards.done == 0
        raise KeyboardInterrupt
    write(tmp_path / "out", A, B)
    assert files(tmp_path / "out") == files(write(tmp_path / "at once", A, B))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_within_a_file(tmp_path: Path) -> None:
    """By the system, at a byte of the second shard: what was half written is not carried along."""
    import resource  # where there is fork

    large = {"b": torch.zeros(1 << 20)}
    process = os.fork()
    if process == 0:
        with writing(tmp_path / "out", 2) as target:
            target.add_shard(A)
            target.shards.wait()
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would make an error of it
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
            target.add_shard(large)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGXFSZ
    left = files(tmp_path / "out.partial" / "checkpoint")
    assert len(left) == 2  # the first shard, and a part of the second under some name
    write(tmp_path / "out", A, large)
    assert files(tmp_path / "out") == files(write(tmp_path / "at once", A, large))


def test_what_differs_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    then = {"recipe": {"rank": 8, "seed": 0}, "torch": "2.8", "model": {"a": 64 * "0"}, "old": 1}
    now = {"recipe": {"rank": 4, "seed": 0}, "torch": "2.9", "model": {"a": 64 * "1"}, "new": 2}
    with pytest.raises(KeyboardInterrupt), Partial(out, then) as begun:
        begun.save("some.safetensors", A)
        raise KeyboardInterrupt
    with pytest.raises(OutputError, match="unfinished conversion that differs") as raised:
        Partial(out, now)
    assert raised.value.where == str(tmp_path / "out.partial")
    for words in (
        "recipe: rank was 8, is 4; ", "torch was 2.8, is 2.9; ", "model: a is another; ",
        "old was 1, and there is none now; ", "new is 2, and there was none then",
    ):  # fmt: skip
        assert words in raised.value.found
    assert "seed" not in raised.value.found
    assert "--no-resume" in raised.value.do
    with pytest.raises(KeyboardInterrupt), Partial(out, then) as begun:
        assert begun.is_whole("some.safetensors")
        raise KeyboardInterrupt


def test_files_that_come_and_go_are_named() -> None:
    then, now = ({"model": {one: 64 * "0", "kept": 64 * "0"}} for one in ("old", "new"))
    assert list(differences(then, now)) == [
        "model: old was there, and is gone",
        "model: new has come since",
    ]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writing(out, 1) as target:
        for resume in (True, False):
            with pytest.raises(OutputError, match="another run is writing") as raised:
                Partial(out, {"of": "tensors"}, resume=resume)
            assert raised.value.where == str(tmp_path / "out.partial")
        target.add_shard(A)
        target.finish({}, {}, {})
    assert list(tmp_path.iterdir()) == [out]


def test_a_partial_folder_of_others_stays(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "precious").write_text("mine")
    with pytest.raises(OutputError, match="not left by this program") as raised:
        write(tmp_path / "out", A)
    assert raised.value.where == str(partial)
    assert (partial / "precious").read_text() == "mine"


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file") as raised:
        write(tmp_path / "file" / "out", A)
    assert raised.value.where == str(tmp_path / "file")


@pytest.mark.parametrize("out", ["/", "."])
def test_no_name(out: str) -> None:
    with pytest.raises(OutputError, match="no folder name"):
        check_free(Path(out), overwrite=True)


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(256)) * 40_000)
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
