"""Writes a packed checkpoint shard by shard into a partial folder that is renamed when whole.

Nothing half-written is ever visible under the final name. What is written depends on the inputs
alone: no dates, no times.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.shards import read_json
from zqfp_convert.errors import OutputError

PARTIAL = ".partial"
MARKER = ".zqfp-partial"


class Writer:
    """A checkpoint being written to `OUT.partial/`; use as a context.

    Leaving the context without `finish()` removes the partial folder.
    """

    def __init__(self, out: Path, shards: int, *, overwrite: bool = False) -> None:
        """Start a checkpoint of `shards` shards.

        Raises:
            OutputError: `out` exists (without `overwrite`), or is not a checkpoint of ours (with).
        """
        check_free(out, overwrite=overwrite)
        self.out = out
        self.partial = out.with_name(out.name + PARTIAL)
        self._count, self._weight_map, self._total = shards, dict[str, str](), 0
        self._shards: dict[str, dict[str, int | str]] = {}
        self._files: list[str] = []
        with _writing(out):
            _discard_partial(self.partial)
            self.partial.mkdir(parents=True)
            (self.partial / MARKER).touch()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if (self.partial / MARKER).exists():
            _discard_partial(self.partial)

    def add_shard(self, tensors: dict[str, Tensor]) -> None:
        """Write the next shard, flushed to the disk."""
        file = layout.shard_file(len(self._shards) + 1, self._count)
        path = self.partial / file
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with _writing(self.out):
            save_file(contiguous, path, metadata={"format": "pt"})
            path.chmod((self.partial / MARKER).stat().st_mode)  # the user's mask, as other files
            _sync(path)
        self._shards[file] = {"size": path.stat().st_size, "sha256": sha256(path)}
        for name, tensor in contiguous.items():
            assert name not in self._weight_map, name
            self._weight_map[name] = file
            self._total += tensor.nbytes

    def copy(self, source: Path, files: Iterable[Path]) -> None:
        """Carry files over, given relative to the folder `source`."""
        for file in files:
            target = self.partial / file
            with _writing(self.out):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file, target)
                _sync(target)
            self._files.append(file.as_posix())

    def finish(
        self, config: dict[str, Any], layers: dict[str, Any], changed: dict[str, str]
    ) -> None:
        """Write configuration, index and manifest, and give the folder its final name."""
        assert len(self._shards) == self._count
        with _writing(self.out):
            if self._count > 1:
                weight_map = dict(sorted(self._weight_map.items()))
                index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
                self._write_json(layout.INDEX_FILE, index)
            manifest = {
                "format": layout.FORMAT,
                "format_version": layout.FORMAT_VERSION,
                "shards": self._shards,
                "layers": layers,
                "changed": changed,
                "files": self._files,
            }
            self._write_json(layout.MANIFEST_FILE, manifest)
            self._write_json(layout.CONFIG_FILE, config)
            _sync(self.partial)
            if self.out.exists():  # overwrite: keep the old one until the new one has its name
                old = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", dir=self.out.parent))
                self.out.rename(old / self.out.name)
                try:
                    self.partial.rename(self.out)
                except OSError:
                    (old / self.out.name).rename(self.out)
                    raise
                shutil.rmtree(old)
            else:
                self.partial.rename(self.out)
            (self.out / MARKER).unlink()
            _sync(self.out.parent)

    def _write_json(self, file: str, value: object) -> None:
        path = self.partial / file
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=file == layout.CONFIG_FILE)
        path.write_text(text + "\n", encoding="utf-8")
        _sync(path)


def check_free(out: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless it may be overwritten and is a checkpoint of ours.

    Raises:
        OutputError: also where its parent is no folder, or an earlier partial folder is not ours.
    """
    if not out.name:
        raise OutputError(str(out), "no folder name", needed="a new folder", do="Give another OUT.")
    partial = out.with_name(out.name + PARTIAL)
    if partial.exists() and not (partial / MARKER).exists():
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


def _refuse_foreign_files(out: Path) -> None:
    """A checkpoint is overwritten whole; what somebody else put into its folder is not ours."""
    manifest = read_json(out / layout.MANIFEST_FILE, "bad-manifest")
    known = {layout.CONFIG_FILE, layout.INDEX_FILE, layout.MANIFEST_FILE, MARKER}
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


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Says what is wrong where something cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
        raise OutputError(
            str(out),
            "the disk is full" if full else f"cannot be written ({error})",
            needed="room for the whole checkpoint" if full else "a folder that can be written",
            do="Make room, or give an output folder on another disk.",
        ) from error


def _discard_partial(partial: Path) -> None:
    if partial.exists():
        shutil.rmtree(partial)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle for a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems refuse it for folders
            raise
    finally:
        os.close(handle)
