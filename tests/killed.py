"""Conversions in child processes that are killed, or that run out of memory or of disk, and go on.

A program for `test_resume.py`. It imports torch and transformers once and forks, so that a
conversion of a tiny model takes a second and not ten. Each command prints a line for people and
ends with 0 only if all that was resumed has the bytes of a conversion that nothing happened to.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from architectures import write_model, write_tokenizer

import zqfp_convert
from zqfp_convert.calibration.stream import Stream
from zqfp_convert.checkpoint.output.partial import partial_folder
from zqfp_convert.conversion.work import Work
from zqfp_convert.errors import OutputError

torch.set_num_threads(1)

CHOICES: dict[str, Any] = {
    "device": "cpu",
    "samples": 8,
    "seq_len": 32,
    "group_size": 32,
    "rank": 2,
    "sweeps": 1,
    "low_rank_rounds": 1,
    "tune_samples": 0,
}
SMALL = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64}
FULL = 3  # the exit code of a conversion that found the disk full


def convert(source: Path, out: Path, **more: Any) -> None:
    zqfp_convert.convert(source, out, **{**CHOICES, **more})


def little_memory(log: Path) -> None:
    """Let batches be too large: in block 1 at once, in block 2 when one batch has left already."""
    here: list[int] = []
    block, advance = Work._block, Stream.advance

    def fail(windows: int) -> None:
        with log.open("a") as file:
            print(here[0], windows, file=file)
        raise torch.OutOfMemoryError("out of memory, says the test")

    def _block(self: Work, index: int, tensors: dict[str, torch.Tensor]) -> Any:
        here[:] = [index]
        try:
            assert self.states is not None
            if index == 1 and self.states.size > 4:
                fail(self.states.size)
            return block(self, index, tensors)
        finally:
            here.clear()

    def _advance(self: Stream, *rest: Any) -> None:
        windows = len(self.hidden[0])
        if here == [2] and windows > 2:
            whole = self.hidden
            self.hidden = whole[:1]
            advance(self, *rest)
            self.hidden, self.moved = [*self.hidden, *whole[1:]], 1
            fail(windows)
        advance(self, *rest)

    Work._block, Stream.advance = _block, _advance  # type: ignore[method-assign]


def child(work: Callable[[], None], seconds: float | None = None) -> bool:
    """Do something in a child, killed after so many seconds; whether it came to its end."""
    process = os.fork()
    if process == 0:
        try:
            work()
        except OutputError as error:
            print(error)
            full = "the disk is full" in error.found
            sys.stdout.flush()
            os._exit(FULL if full else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status):
        raise SystemExit(os.WEXITSTATUS(status))
    return True


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def kill(source: Path, folder: Path, kind: str, kills: int, seed: int) -> None:
    """Kill conversions at random moments, spread over all of their time, and let them go on."""
    choices = {"recipe": "max", "tune": 3} if kind == "max" else {}
    log = folder / "log"
    folder.mkdir()

    def start(out: Path) -> Callable[[], None]:
        def work() -> None:
            if kind == "little-memory":
                little_memory(log)
            convert(source, out, **choices)

        return work

    child(start(folder / "warm"))
    began = time.monotonic()
    child(start(folder / "whole"))
    seconds = time.monotonic() - began
    want = digests(folder / "whole")
    assert digests(folder / "warm") == want
    if kind == "little-memory":
        assert log.read_text().splitlines()[:2] == ["1 8", "2 4"], log.read_text()
    chance = random.Random(seed)
    late, kept, killed = 0, 0, [0] * kills
    for number in range(kills):
        out = folder / str(number)
        left = seconds * (number + chance.random()) / kills
        at_end = False
        while not out.exists():
            if child(start(out), left):
                if not killed[number]:  # too late: once more, and earlier
                    shutil.rmtree(out)
                    late += 1
                    left *= chance.random()
                continue
            killed[number] += 1
            at_end = out.exists()  # all but clearing up was done
            if at_end:
                continue
            kept += (partial_folder(out) / "text.safetensors").exists()
            if number % 3 or chance.random() < 0.5:  # some are killed more than once
                child(start(out))
            left = seconds * chance.random()
        assert digests(out) == want, f"killed after {left:.3f} of {seconds:.3f} s: other bytes"
        assert at_end or not partial_folder(out).exists()
    assert all(killed)
    assert kept >= kills // 4
    print(
        f"{kind}: {sum(killed)} kills of {kills} conversions of {seconds:.2f} s: {kept} times "
        f"there was something to go on from; {late} came too late"
    )


def fill_disk(source: Path, folder: Path, limit: int) -> None:
    """Let the disk fill up in the middle, make room, and go on."""
    child(lambda: convert(source, folder / "whole"))
    want = digests(folder / "whole")
    ballast, out = folder / "ballast", folder / "out"

    def progress(text: str, done: int, total: int) -> None:
        if not text.startswith("block 3/3"):
            return
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        elif not ballast.exists():
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1 << 16))
                except OSError:
                    pass

    code = 0
    try:
        child(lambda: convert(source, out, progress=progress))
    except SystemExit as stopped:
        code = stopped.code
    assert code == FULL
    assert not out.exists()
    assert (partial_folder(out) / "checkpoint").is_dir()
    ballast.unlink(missing_ok=True)
    child(lambda: convert(source, out))
    assert digests(out) == want
    assert not partial_folder(out).exists()
    print("went on after the disk was full")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for kind in ("best", "little-memory", "max"):
        parser.add_argument(f"--{kind}", type=int, default=0, help="how often to kill it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fill-disk", action="store_true")
    parser.add_argument("--limit", type=int, default=0, help="of a file's bytes, instead")
    given = parser.parse_args()
    CHOICES["device"] = given.device
    dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
    source = write_model(given.folder / "source", dtype=dtype, **SMALL)
    write_tokenizer(source)
    for kind in ("best", "little-memory", "max"):
        if kills := getattr(given, kind.replace("-", "_")):
            kill(source, given.folder / kind, kind, kills, given.seed)
    if given.fill_disk:
        fill_disk(source, given.folder, given.limit)


if __name__ == "__main__":
    main()
