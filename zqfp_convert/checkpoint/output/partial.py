"""The folder beside OUT in which a checkpoint comes about, and what its journal says is done.

`OUT.partial/` holds the journal, the checkpoint so far, and files that only a later run needs. What
the journal records is on the disk, so a run that was killed at any moment can be taken up again.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.output.disk import sha256, sync, writing
from zqfp_convert.checkpoint.output.journal import Followed, Journal, Locked
from zqfp_convert.checkpoint.shards import Shards, read_header, read_json
from zqfp_convert.errors import OutputError, ProcessError, ZqfpError
from zqfp_convert.parallel import ALONE, World

SUFFIX = ".partial"
JOURNAL = "journal"
CHECKPOINT = "checkpoint"  # what becomes OUT
REPLACED = "replaced"  # the checkpoint that was OUT before, while the new one takes its name
SEEN_AFTER = 60.0  # seconds, which network file systems may take to show a folder
MOST_DIFFERENCES = 6  # that an error names


class Partial:
    """A checkpoint that is coming about; use as a context.

    Leaving the context with an error keeps the folder once work is done: a file is recorded that
    comes with values of its own, as blocks do. Files that are less work, a text or what is only
    carried over, are kept unless the error is one that the same run would meet again, which is no
    Ctrl-C, full disk, want of memory or fault of the program. Else, and when the checkpoint has its
    final name, the folder goes.

    Of several processes the first keeps the journal, and the others know what it holds; all of them
    call all methods, save where they say otherwise, and see the same folder.

    Attributes:
        out: where the checkpoint will be.
        folder: where it is until then.
        world: the processes.
    """

    def __init__(
        self,
        out: Path,
        conversion: Mapping[str, Any] | None = None,
        *,
        overwrite: bool = False,
        resume: bool = True,
        world: World = ALONE,
    ) -> None:
        """Begin a partial output, or go on with the one that is there.

        Args:
            out: the checkpoint's folder.
            conversion: what decides over the bytes: JSON values that have to be the same to go on.
            overwrite: whether `out` may be a checkpoint of ours.
            resume: if false, what an earlier run left is thrown away.
            world: the processes that do it together.

        Raises:
            OutputError: `out` exists (without `overwrite`), or is not a checkpoint of ours (with);
                another run works there; the earlier run was of another conversion; or another
                host does not see the folder.
        """
        self.out, self.folder, self.world = out, partial_folder(out), world
        self._finished = False
        self._journal: Journal | Followed
        self._files: dict[str, dict[str, Any]]
        if world.leads:
            self._open(dict(conversion or {}), overwrite=overwrite, resume=resume)
        records = world.broadcast(self._journal.records if world.leads else [])
        if not world.leads:
            self._journal = Followed(self.folder / JOURNAL, records)
            self._files = {r["file"]: r for r in records if "file" in r}
            self._check_shared()

    def _open(self, conversion: dict[str, Any], *, overwrite: bool, resume: bool) -> None:
        """Lock the journal, and begin or go on."""
        out = self.out
        check_free(out, overwrite=overwrite)
        with writing(out):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._journal = Journal(self.folder / JOURNAL)
            except Locked:
                raise OutputError(
                    str(self.folder),
                    "another run is writing to it",
                    needed="one run at a time",
                    do="Wait until it has ended, or give another OUT.",
                ) from None
        try:
            self._files = {r["file"]: r for r in self._journal.records if "file" in r}
            if resume and self._files and (self.folder / CHECKPOINT).is_dir():
                self._refuse_differences(conversion)
                self._remove_unrecorded()
            else:
                self._begin(conversion)
                check_free(out, overwrite=overwrite)
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        users = isinstance(error, ZqfpError) and not isinstance(error, (OutputError, ProcessError))
        worked = any(record["about"] for record in self._files.values())
        worth = worked or (bool(self._files) and not users)
        keep = error is not None and worth and not self._finished
        try:
            if not keep and self.world.leads:
                self._remove_all()
            told = isinstance(error, ProcessError)  # says so itself
            if keep and isinstance(error, ZqfpError) and not told:
                error.advise(
                    f"What is done is kept in {self.folder}: when that is put right, the same "
                    "command goes on from there."
                )
        finally:
            self._journal.close()

    def note(self, name: str, value: Any) -> None:
        """Write a decision, a JSON value, into the journal."""
        with writing(self.out):
            self._journal.append({"note": name, "value": value})

    def noted(self, name: str) -> list[Any]:
        """All decisions of that name, in order."""
        return [record["value"] for record in self._journal.records if record.get("note") == name]

    def decided(self, name: str, value: Any) -> Any:
        """The first decision of that name; `value`, which is noted, where there is none."""
        if not (earlier := self.noted(name)):
            value = self.world.broadcast(value)
            self.note(name, value)
            return value
        return earlier[0]

    def save(
        self, file: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
    ) -> None:
        """Write tensors into a file, relative to the folder, and record it once it is on the disk.

        `about` are JSON values that go into the record.
        """
        self.take(self.world.lead(lambda: self.write(file, tensors, about)))

    def write(
        self, file: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write tensors into a file, through to the disk; its record. One process does."""
        path = self.folder / file
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with writing(self.out):
            path.parent.mkdir(exist_ok=True)
            save_file(contiguous, path, metadata={"format": "pt"})
            path.chmod(self._journal.path.stat().st_mode)  # the user's mask, as other files
            with ThreadPoolExecutor(1, "digest") as thread:  # as slow as the disk
                digest = thread.submit(sha256, path)
                sync(path)
            sync(path.parent)
            return {
                "file": file,
                "size": path.stat().st_size,
                "sha256": digest.result(),
                "tensors": {name: tensor.nbytes for name, tensor in contiguous.items()},
                "about": dict(about or {}),
            }

    def take(self, record: dict[str, Any]) -> None:
        """Record a file that is on the disk."""
        with writing(self.out):
            self._journal.append(record)
        self._files[record["file"]] = record

    def whole(self, files: Sequence[str]) -> int:
        """How many files, from the first on, are recorded and still are what they were then."""
        broken = (number for number, file in enumerate(files) if not self._is_whole(file))
        return self.world.lead(lambda: next(broken, len(files)))

    def is_whole(self, file: str) -> bool:
        """Whether a file is recorded, and still is what it was then."""
        return self.whole([file]) == 1

    def _is_whole(self, file: str) -> bool:
        record, path = self._files.get(file), self.folder / file
        return (
            record is not None
            and path.is_file()
            and path.stat().st_size == record["size"]
            and sha256(path) == record["sha256"]
        )

    def record(self, file: str) -> dict[str, Any]:
        """The record of a file: `size`, `sha256`, `tensors` (bytes by names), `about`."""
        return self._files[file]

    def load(self, file: str) -> dict[str, Tensor]:
        """The tensors of a recorded file."""
        header = read_header(self.folder, file)
        return Shards(self.folder, header).read(header)

    def give_name(self) -> None:
        """Make the checkpoint appear as OUT; the partial folder goes with the end of the context.

        What is overwritten is there until then. The first process does.
        """
        replaced = self.folder / REPLACED
        with writing(self.out):
            if self.out.exists():
                if replaced.exists():
                    shutil.rmtree(replaced)
                self.out.rename(replaced)
            try:
                (self.folder / CHECKPOINT).rename(self.out)
            except OSError:
                self._restore()
                raise
            self._finished = True
            sync(self.out.parent)

    def _check_shared(self) -> None:
        """Refuse a host that does not see what the first process writes."""
        until = time.monotonic() + SEEN_AFTER
        while not self._journal.path.is_file():
            if time.monotonic() > until:
                raise OutputError(
                    str(self.folder),
                    f"not there on {socket.gethostname()}, although another process works in it",
                    needed="an output folder that all hosts share",
                    do="Give an OUT on a file system that every host has mounted at this place.",
                )
            time.sleep(0.2)

    def _begin(self, conversion: dict[str, Any]) -> None:
        with writing(self.out):
            self._restore()
            self._journal.clear()  # first: files without records are no harm
            self._files.clear()
            self._remove_files()
            (self.folder / CHECKPOINT).mkdir()
            self._journal.append({"begin": conversion})
            sync(self.folder)
            sync(self.folder.parent)

    def _refuse_differences(self, conversion: dict[str, Any]) -> None:
        begun = next(record["begin"] for record in self._journal.records if "begin" in record)
        found = list(differences(begun, conversion))
        if not found:
            return
        more = f" and {len(found) - MOST_DIFFERENCES} more" if len(found) > MOST_DIFFERENCES else ""
        raise OutputError(
            str(self.folder),
            f"an unfinished conversion that differs: {'; '.join(found[:MOST_DIFFERENCES])}{more}",
            needed="the same conversion, to go on with it",
            do="Give what was given then (move away files that have come since, bring back those "
            "that are gone); or throw it away with --no-resume (in Python: resume=False); or give "
            "another OUT.",
        )

    def refuse(self, found: str) -> OutputError:
        """The error that says that this unfinished conversion cannot be gone on with."""
        return OutputError(
            str(self.folder),
            found,
            needed="the model, the programs and the kind of machine that it was begun with",
            do="Go on there, or throw it away with --no-resume (in Python: resume=False).",
        )

    def _restore(self) -> None:
        """Give what was to be replaced its name back, if a run died just then."""
        if (self.folder / REPLACED).exists() and not self.out.exists():
            (self.folder / REPLACED).rename(self.out)

    def _remove_all(self) -> None:
        """The folder goes, the journal last: what is left at any moment is known as ours."""
        self._restore()
        self._journal.clear()
        self._remove_files()
        self._journal.path.unlink()
        self.folder.rmdir()

    def _remove_unrecorded(self) -> None:
        """Remove what the run before was still writing when it was killed.

        Else it would come to be in OUT: safetensors writes under a name that it makes up, and gives
        a file its own name once it is whole. What else has no record is written again anyway.
        """
        kept = {JOURNAL, *self._files}
        with writing(self.out):
            for path in list(self.folder.rglob("*")):
                name = path.relative_to(self.folder)
                if name.parts[0] == REPLACED or name.as_posix() in kept:
                    continue
                if path.is_symlink() or not path.is_dir():
                    path.unlink()

    def _remove_files(self) -> None:
        for path in self.folder.iterdir():
            if path.name == JOURNAL:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def partial_folder(out: Path) -> Path:
    """Where the checkpoint `out` lies until it is whole."""
    return out.with_name(out.name + SUFFIX)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """In words, where two trees of JSON values differ."""
    for key in dict.fromkeys((*before, *now)):
        name, old, new = f"{path}{key}", before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{name}: ")
        elif key not in now or new is None:
            told = f"was {_short(old)}, and there is none now"
            yield f"{name} {'was there, and is gone' if _is_hash(old) else told}"
        elif key not in before or old is None:
            told = f"is {_short(new)}, and there was none then"
            yield f"{name} {'has come since' if _is_hash(new) else told}"
        elif old != new:
            said = isinstance(old, (dict, list)) or isinstance(new, (dict, list))
            same = said or _short(old) == _short(new)
            yield f"{name} is another" if same else f"{name} was {_short(old)}, is {_short(new)}"


def _short(value: Any) -> str:
    if _is_hash(value):
        return "another"
    if isinstance(value, (dict, list)):
        return "something"
    return str(value)


def _is_hash(value: Any) -> bool:
    """Whether it is the hash of a file, which tells a person nothing."""
    return isinstance(value, str) and len(value) == 64


def check_free(out: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless it may be overwritten and is a checkpoint of ours.

    Raises:
        OutputError: also where its parent is no folder, or an earlier partial folder is not ours.
    """
    if not out.name:
        raise OutputError(str(out), "no folder name", needed="a new folder", do="Give another OUT.")
    partial = partial_folder(out)
    empty = partial.is_dir() and not any(partial.iterdir())
    if partial.exists() and not (partial / JOURNAL).is_file() and not empty:
        raise OutputError(
            str(partial),
            "exists, and was not left by this program",
            needed="that name free, to work in",
            do="Move it away, or give another OUT.",
        )
    existing = next((p for p in out.absolute().parents if p.exists()), None)
    if existing is not None and not existing.is_dir():
        raise OutputError(
            str(existing), "is a file", needed="a folder to write to", do="Give another OUT."
        )
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise OutputError(
            str(out), "exists", needed="a new folder", do="Give another OUT, or add --overwrite."
        )
    ours = (out / layout.MANIFEST_FILE).is_file() and not out.is_symlink()
    if ours:
        _refuse_foreign_files(out)
    elif not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(
            str(out),
            f"exists and is not a zqfp checkpoint (no {layout.MANIFEST_FILE})",
            needed="a zqfp checkpoint or an empty folder, to overwrite it",
            do="Give another OUT, or remove it yourself.",
        )


def disk_of(out: Path) -> Path:
    """A folder that is there, on the disk where an output will be."""
    return next(p for p in out.absolute().parents if p.exists())


def room(out: Path) -> int:
    """Bytes free for an output, with what an earlier run has left, which is used or thrown away."""
    earlier = partial_folder(out).rglob("*")
    unfinished = sum(path.stat().st_size for path in earlier if path.is_file())
    return shutil.disk_usage(disk_of(out)).free + unfinished


def check_room(out: Path, needed: int) -> None:
    """Refuse an output of so many bytes where there is too little room on its disk.

    Raises:
        OutputError: naming both.
    """
    free = room(out)
    if free < needed:
        raise OutputError(
            str(disk_of(out)),
            f"{free / 1e6:,.0f} MB of free disk space",
            needed=f"{needed / 1e6:,.0f} MB for the checkpoint and what lies beside it meanwhile",
            do="Make room, or give an output folder on another disk.",
        )


def _refuse_foreign_files(out: Path) -> None:
    """A checkpoint is overwritten whole; what somebody else put into its folder is not ours."""
    manifest = read_json(out / layout.MANIFEST_FILE, "bad-manifest")
    known = {layout.CONFIG_FILE, layout.INDEX_FILE, layout.MANIFEST_FILE}
    known |= {layout.REPORT_PAGE, layout.REPORT_PICTURE, layout.EVALUATION_FILE}
    known |= {*manifest.get("shards", ()), *manifest.get("files", ())}
    inside = (path for path in sorted(out.rglob("*")) if path.is_symlink() or not path.is_dir())
    foreign = [path for path in inside if path.relative_to(out).as_posix() not in known]
    if foreign:
        raise OutputError(
            str(foreign[0]),
            "would be lost with the checkpoint that is to be overwritten",
            needed="only the checkpoint's own files in its folder",
            do="Move it away, or give another OUT.",
        )
