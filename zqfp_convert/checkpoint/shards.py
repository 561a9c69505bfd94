"""Safetensors shards of a folder, read by tensor name; headers are checked before any data.

Serves sources and packed checkpoints alike. Files are mapped only while they are read.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zqfp_convert.checkpoint import layout
from zqfp_convert.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of a tensor: its file's name, dtype as spelled there, shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the data."""
        size = DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1
        for extent in self.shape:
            size *= extent
        return size


class Shards:
    """The tensors of a folder's `model.safetensors`, or of the shards that its index names."""

    def __init__(self, folder: Path) -> None:
        """Read the index and every header.

        Raises:
            CheckpointError: a shard is missing, truncated or lies outside the folder, or a tensor
                is not where the index says.
        """
        self.folder = folder
        index = folder / layout.INDEX_FILE
        listed = _read_index(index) if index.is_file() else None
        files = [layout.SINGLE_SHARD] if listed is None else sorted(set(listed.values()))
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in self._read_header(file):
                if listed is None or listed.get(name) == file:
                    self.tensors[name] = info
        for name, file in (listed or {}).items():
            if name not in self.tensors:
                raise CheckpointError(
                    "missing-tensor",
                    str(folder / file),
                    f"no tensor {name!r}, though {layout.INDEX_FILE} says so",
                    needed="shards and index that belong together",
                    do="Download the model again.",
                )

    @property
    def files(self) -> list[str]:
        """The names of the shards that hold at least one tensor."""
        return sorted({info.file for info in self.tensors.values()})

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU, in the dtype they are stored in."""
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.tensors[name].file].append(name)
        result: dict[str, Tensor] = {}
        for file, members in by_file.items():
            with safe_open(str(self.folder / file), framework="pt") as shard:
                for name in members:
                    result[name] = shard.get_tensor(name)
        return result

    def _read_header(self, file: str) -> Iterator[tuple[str, TensorInfo]]:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(
                "missing-file",
                str(path),
                "no such file",
                needed="every shard of the model",
                do="Download the missing file.",
            )
        try:
            with safe_open(str(path), framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    part = shard.get_slice(name)
                    yield name, TensorInfo(file, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                "bad-shard",
                str(path),
                f"not a whole safetensors file ({error})",
                needed="a complete shard",
                do="Download it again; it may have been cut off.",
            ) from error


def read_json(path: Path, rule: str) -> dict[str, Any]:
    """The JSON object in a file; breaks of `rule` are a CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        raise CheckpointError(
            "missing-file" if missing else rule,
            str(path),
            "no such file" if missing else f"not readable as JSON ({error})",
            needed="a JSON object",
            do="Download or make the folder again.",
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            rule,
            str(path),
            f"a JSON {type(value).__name__}",
            needed="a JSON object",
            do="Download or make the folder again.",
        )
    return value


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path, "bad-shard").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "bad-shard",
            str(path),
            "no 'weight_map'",
            needed="an index that maps tensor names to files",
            do="Download the index again.",
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                "outside-folder",
                str(path),
                f"tensor {name!r} in {file!r}",
                needed="shards in the folder of the index itself",
                do="Do not use this model: its index reaches for other files.",
            )
    return weight_map
