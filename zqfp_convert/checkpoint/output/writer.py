"""Writes a packed checkpoint shard by shard, in a partial folder that becomes OUT when whole.

Nothing half-written is ever visible under the final name. What is written depends on the inputs
alone: no dates, no times.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.description import manifest
from zqfp_convert.checkpoint.output.disk import sync, writing
from zqfp_convert.checkpoint.output.partial import CHECKPOINT, Partial
from zqfp_convert.checkpoint.output.series import Series


class Writer:
    """A checkpoint being written; use as a context, within that of its partial output.

    Of several processes each writes some shards, and the first the other files.

    Attributes:
        shards: those written so far, by an earlier run too.
    """

    def __init__(
        self, partial: Partial, shards: int, *, anew: bool = False, shared: bool = True
    ) -> None:
        """A checkpoint of `shards` shards; `anew`: those of an earlier run do not count.

        Without `shared` the first process has and writes them all.
        """
        self.partial, self._folder = partial, partial.folder / CHECKPOINT
        self._names = [layout.shard_file(number + 1, shards) for number in range(shards)]
        self.shards = Series(
            partial, [f"{CHECKPOINT}/{name}" for name in self._names], shared=shared
        )
        if anew:
            self.shards.done = 0
        self._files: list[str] = []

    def __enter__(self) -> Writer:
        self.shards.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shards.__exit__(kind, error, trace)

    def add_shard(
        self,
        tensors: dict[str, Tensor],
        about: Mapping[str, Any] | None = None,
        *,
        waiting: int = 0,
    ) -> None:
        """Have the next shard written, with JSON values for the journal; as `Series.add`."""
        self.shards.add(tensors, about, waiting=waiting)

    def copy(self, source: Path, files: Iterable[Path]) -> None:
        """Carry files over, given relative to the folder `source`."""
        for file in files if self.partial.world.leads else ():
            target = self._folder / file
            with writing(self.partial.out):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file, target)
                sync(target)
            self._files.append(file.as_posix())

    def add_text(self, file: str, text: str) -> None:
        """Write a file of text beside the shards."""
        if self.partial.world.leads:
            with writing(self.partial.out):
                (self._folder / file).write_text(text, encoding="utf-8")
                sync(self._folder / file)
            self._files.append(file)

    def packed_bytes(self) -> int:
        """The bytes of all packed tensors so far."""
        self.shards.wait()
        return sum(
            size
            for file in self.shards.files[: self.shards.done]
            for name, size in self.partial.record(file)["tensors"].items()
            if layout.layer_of(name) is not None
        )

    def finish(
        self, config: dict[str, Any], layers: dict[str, Any], changed: dict[str, str]
    ) -> None:
        """Write configuration, index and manifest, and give the folder its final name."""
        self.shards.wait()
        if not self.partial.world.leads:
            return
        records = self._records()
        shards = {
            name: {"size": record["size"], "sha256": record["sha256"]}
            for name, record in records.items()
        }
        about = manifest(shards, layers, changed) | {"files": self._files}
        self._finish(config, {layout.MANIFEST_FILE: about})

    def finish_plain(
        self, config: dict[str, Any], others: Mapping[str, dict[str, Any]] | None = None
    ) -> None:
        """As `finish`, for a model of another format: no manifest; other JSON files by name."""
        self.shards.wait()
        self._finish(config, others or {})

    def _records(self) -> dict[str, dict[str, Any]]:
        assert self.shards.done == len(self._names)
        files = zip(self._names, self.shards.files, strict=True)
        return {name: self.partial.record(file) for name, file in files}

    def _finish(self, config: dict[str, Any], others: Mapping[str, dict[str, Any]]) -> None:
        sizes: dict[str, int] = {}
        weight_map: dict[str, str] = {}
        for name, record in self._records().items():
            assert not sizes.keys() & record["tensors"].keys()
            sizes |= record["tensors"]
            weight_map |= dict.fromkeys(record["tensors"], name)
        with writing(self.partial.out):
            if len(self._names) > 1:
                total = {"total_size": sum(sizes.values())}
                index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
                self._write_json(layout.INDEX_FILE, index)
            for file, value in others.items():
                self._write_json(file, value)
            self._write_json(layout.CONFIG_FILE, config)
            sync(self._folder)
        self.partial.give_name()

    def _write_json(self, file: str, value: object) -> None:
        path = self._folder / file
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=file == layout.CONFIG_FILE)
        path.write_text(text + "\n", encoding="utf-8")
        sync(path)
