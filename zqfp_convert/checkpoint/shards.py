"""Safetensors shards of a folder, read by tensor name; headers are checked before any data.

Serves sources and packed checkpoints alike. Tensors are read into memory of their own, so that what
a process holds is what it has asked for, and not what it has looked at in mapped files.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zqfp_convert.checkpoint import layout
from zqfp_convert.errors import CheckpointError

AGAIN = "Download or make the folder again."

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
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
MOST_AT_ONCE = 1 << 30  # bytes that the system is asked for
PIECE = 16 << 20  # bytes that go to a GPU at a time
PIECES = 4


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of a tensor: its file's name, dtype as spelled there, shape.

    `start` is where its bytes begin in the file; None where it is made of what lies there.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    start: int | None = None


class Shards:
    """The tensors of a folder's shards.

    Attributes:
        folder: where they lie.
        tensors: what the headers say of each tensor, by name.
    """

    def __init__(self, folder: Path, tensors: dict[str, TensorInfo]) -> None:
        self.folder, self.tensors = folder, tensors

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """The tensors of `model.safetensors`, or those that the index names.

        Raises:
            CheckpointError: a shard is missing, truncated or lies outside the folder, or a tensor
                is not where the index says.
        """
        single = (folder / layout.SINGLE_SHARD).is_file()  # goes before an index, as elsewhere
        index = None if single else read_index(folder)
        files = [layout.SINGLE_SHARD] if index is None else sorted(set(index.values()))
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in read_header(folder, file).items():
                if index is None or index.get(name) == file:
                    tensors[name] = info
        for name, file in (index or {}).items():
            if name not in tensors:
                raise CheckpointError(
                    "bad-shard",
                    str(folder / file),
                    f"no tensor {name!r}, though {layout.INDEX_FILE} says so",
                    needed="shards and index that belong together",
                    do=AGAIN,
                )
        return cls(folder, tensors)

    @property
    def stored_bytes(self) -> int:
        """Of all tensors, as they lie on disk."""
        return sum(info.bytes for info in self.tensors.values())

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The named tensors, on a device, in the dtype they are stored in."""
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.tensors[name].file].append(name)
        result: dict[str, Tensor] = {}
        for file, members in by_file.items():
            with (self.folder / file).open("rb", buffering=0) as shard:
                for name in members:
                    result[name] = _read(shard, name, self.tensors[name], device)
        return result

    def pieces(self, name: str, size: int) -> Iterator[Tensor]:
        """The numbers of a tensor, at most so many bytes of them at a time, on the CPU.

        Each piece may be changed, and is there until the next one is asked for: all are read into
        the same memory.
        """
        info = self.tensors[name]
        if info.start is None:
            flat = self.read([name])[name].reshape(-1)
            yield from torch.split(flat, max(1, size // flat.itemsize))
            return
        memory = torch.empty(min(size, info.bytes), dtype=torch.uint8)
        with (self.folder / info.file).open("rb", buffering=0) as shard:
            shard.seek(info.start)
            for done in range(0, info.bytes, size):
                piece = memory[: info.bytes - done]
                _fill(shard, piece, name, info)
                yield piece.view(_dtype(name, info))

    def read_at(self, name: str, index: int) -> Tensor:
        """What lies at an index along the first dimension of the named tensor; no more is read."""
        info = self.tensors[name]
        assert info.start is not None
        size = info.bytes // info.shape[0]
        part = replace(info, shape=info.shape[1:], bytes=size, start=info.start + index * size)
        with (self.folder / info.file).open("rb", buffering=0) as shard:
            return _read(shard, name, part)


def _read(file: FileIO, name: str, info: TensorInfo, device: torch.device | str = "cpu") -> Tensor:
    """A tensor out of an open file.

    Raises:
        CheckpointError: `bad-shard`, for a dtype that is not known, or a file that is shorter now.
    """
    assert info.start is not None
    device = torch.device(device)
    here = device if device.type == "cuda" else "cpu"
    tensor = torch.empty(info.shape, dtype=_dtype(name, info), device=here)
    whole = tensor.reshape(-1).view(torch.uint8)
    file.seek(info.start)
    fill = _copy if whole.is_cuda else _fill
    fill(file, whole, name, info)
    return tensor.to(device)


def _dtype(name: str, info: TensorInfo) -> torch.dtype:
    if info.dtype not in DTYPES:
        found, needed = f"dtype {info.dtype}", f"one of {', '.join(DTYPES)}"
        raise CheckpointError("bad-shard", f"{name} in {info.file}", found, needed=needed, do=AGAIN)
    return DTYPES[info.dtype]


def _copy(file: FileIO, target: Tensor, name: str, info: TensorInfo) -> None:
    """Fill bytes on a GPU, through pieces of host memory that it can read by itself.

    Some threads fill them; one copies no more than 3 GB/s out of the system's cache.
    """
    cuda: Any = torch.cuda
    start = info.start
    assert start is not None
    parts = torch.split(target, PIECE)
    count = min(PIECES, len(parts))
    with cuda.device(target.device), ThreadPoolExecutor(count, "fill") as pool:  # of its stream
        size = min(PIECE, max(1, len(target)))
        pieces = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(count)]
        copied = [cuda.Event() for _ in range(count)]

        def fill(number: int) -> Tensor:
            copied[number % count].synchronize()
            piece = pieces[number % count][: len(parts[number])]
            with Path(file.name).open("rb", buffering=0) as own:  # it has a place of its own
                own.seek(start + number * PIECE)
                _fill(own, piece, name, info)
            return piece

        filling = deque(pool.submit(fill, number) for number in range(count))
        for number, part in enumerate(parts):
            part.copy_(filling.popleft().result(), non_blocking=True)
            copied[number % count].record()
            if number + count < len(parts):
                filling.append(pool.submit(fill, number + count))


def _fill(file: FileIO, target: Tensor, name: str, info: TensorInfo) -> None:
    """Fill bytes on the CPU with what comes next in a file."""
    rest = target.numpy().data
    while rest:
        got = file.readinto(rest[:MOST_AT_ONCE])
        if not got:
            found, needed = "a file that ends within it", "a complete shard"
            where = f"{name} in {info.file}"
            raise CheckpointError("bad-shard", where, found, needed=needed, do=AGAIN)
        rest = rest[got:]


def read_header(folder: Path, file: str) -> dict[str, TensorInfo]:
    """What the header of a shard says, after the library has found the file whole.

    Raises:
        CheckpointError: `missing-file` or `bad-shard`.
    """
    path = folder / file
    if not path.is_file():
        raise CheckpointError(
            "missing-file", str(path), "no such file", needed="every shard of the model", do=AGAIN
        )
    try:
        with safe_open(str(path), framework="pt"):
            pass
        with path.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(length), object_pairs_hook=_no_key_twice)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            "bad-shard",
            str(path),
            f"not a whole safetensors file ({error})",
            needed="a complete shard",
            do="Download it again; it may have been cut off.",
        ) from error
    header.pop("__metadata__", None)
    result = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        shape, start = tuple(entry["shape"]), 8 + length + begin
        result[name] = TensorInfo(file, entry["dtype"], shape, end - begin, start)
    return result


def read_index(folder: Path) -> dict[str, str]:
    """The map of an index from tensors to files.

    Raises:
        CheckpointError: `missing-file`, `bad-shard` or `outside-folder`.
    """
    path = folder / layout.INDEX_FILE
    weight_map = read_json(path, "bad-shard").get("weight_map")
    strings = isinstance(weight_map, dict) and all(isinstance(f, str) for f in weight_map.values())
    if not strings or not weight_map:
        raise CheckpointError(
            "bad-shard",
            str(path),
            "no 'weight_map' from names to names",
            needed="an index that maps tensor names to files",
            do="Download the index again.",
        )
    for file in weight_map.values():
        check_inside(path, file)
    return dict(weight_map)


def check_inside(where: Path, file: str) -> None:
    """Refuse a shard's name that could leave the folder.

    Raises:
        CheckpointError: `outside-folder`.
    """
    if file in ("", ".", "..") or any(mark in file for mark in "/\\:\0"):
        raise CheckpointError(
            "outside-folder",
            str(where),
            f"shard {file!r}",
            needed="shards in the folder itself",
            do="Do not use this model: it reaches for other files.",
        )


def read_json(path: Path, rule: str, *, constants: bool = False) -> dict[str, Any]:
    """The JSON object in a file, no key twice; `constants` admits NaN and Infinity as numbers.

    Raises:
        CheckpointError: `missing-file`, or `rule`.
    """

    def refuse(word: str) -> float:
        raise ValueError(f"the word {word}")

    try:
        value = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_no_key_twice,
            parse_constant=None if constants else refuse,
        )
    except (OSError, ValueError, RecursionError) as error:
        missing = isinstance(error, OSError)
        raise CheckpointError(
            "missing-file" if missing else rule,
            str(path),
            "no such file" if missing else f"not readable as JSON ({error})",
            needed="a JSON object",
            do=AGAIN,
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            rule, str(path), f"a JSON {type(value).__name__}", needed="a JSON object", do=AGAIN
        )
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key that stands twice in one object")
    return value
