"""Writes a model folder of another format, shard by shard, with the memory of two shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.output.disk import sync, writing
from zqfp_convert.checkpoint.output.partial import CHECKPOINT, Partial
from zqfp_convert.checkpoint.output.writer import Writer
from zqfp_convert.checkpoint.source.source import other_files

# What is about the packed checkpoint, and not about what is made of it.
OF_PACKED = (layout.REPORT_PAGE, layout.REPORT_PICTURE, layout.EVALUATION_FILE)
TERMS = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
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
        card: the model card.
        adapter: makes the tensors of a file to write before, or None; its name below the folder.
        others: more JSON files by name.
    """

    pieces: Sequence[Piece]
    config: dict[str, Any]
    card: str
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
        writer.copy(source, [p for p in other_files(source) if p.as_posix() not in OF_PACKED])
        writer.add_text(layout.CARD, contents.card)
        writer.finish_plain(contents.config, contents.others)
    return found


def write_terms(folder: Path, source: Path, card: str) -> None:
    """Put the card, and the terms that the weights come with, beside a file that has all else.

    Raises:
        OutputError: they cannot be written.
    """
    with writing(folder):
        for path in other_files(source):
            if path.name.upper().startswith(TERMS) and len(path.parts) == 1:
                shutil.copyfile(source / path, folder / path)
                sync(folder / path)
        (folder / layout.CARD).write_text(card, encoding="utf-8")
        sync(folder / layout.CARD)


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
