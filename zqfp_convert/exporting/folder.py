"""Writes a model folder of another format, shard by shard, with the memory of two shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from zqfp_convert.checkpoint.partial import CHECKPOINT, Partial
from zqfp_convert.checkpoint.source import other_files
from zqfp_convert.checkpoint.writer import Writer

SHARD = 2_000_000_000  # bytes, about

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together.

    Attributes:
        name: shown while they are made.
        bytes: how large they are.
        make: makes them, and what is noted of them: JSON values by names.
    """

    name: str
    bytes: int
    make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]


@dataclass(frozen=True)
class Contents:
    """What a folder will hold, beside the files that are carried over.

    Attributes:
        pieces: the tensors.
        config: `config.json`.
        adapter: makes the tensors of a file to write before, or None; its name below the folder.
        others: more JSON files by name.
    """

    pieces: Sequence[Piece]
    config: dict[str, Any]
    adapter: tuple[str, Callable[[], dict[str, Tensor]]] | None = None
    others: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def write(partial: Partial, source: Path, contents: Contents, report: Report) -> dict[str, Any]:
    """Write the folder and give it its name; all that was noted of its pieces.

    Raises:
        OutputError: it cannot be written.
    """
    shards = _shards(contents.pieces)
    if contents.adapter is not None:
        name, make = contents.adapter
        file = f"{CHECKPOINT}/{name}"
        if not partial.is_whole(file):
            partial.save(file, make())
    done = 0
    with Writer(partial, len(shards)) as writer:
        for number, pieces in enumerate(shards):
            tensors: dict[str, Tensor] = {}
            noted: dict[str, Any] = {}
            for piece in pieces if number >= writer.shards.done else ():
                report(piece.name, done, len(contents.pieces))
                made, about = piece.make()
                tensors |= made
                noted |= about
                done += 1
            if number >= writer.shards.done:
                writer.add_shard(tensors, noted)
            else:
                done += len(pieces)
        found: dict[str, Any] = {}
        for number in range(len(shards)):
            found |= writer.shards.about(number)
        writer.copy(source, other_files(source))
        writer.finish_plain(contents.config, contents.others)
    return found


def _shards(pieces: Sequence[Piece]) -> list[list[Piece]]:
    shards: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        if not shards or size + piece.bytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.bytes
    return shards
