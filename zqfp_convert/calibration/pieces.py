"""Text in pieces that a tokenizer takes one by one, so that no text has to be in memory whole.

A tokenizer needs some 160 bytes for a byte of text. Pieces are cut between lines, else between
words, where the usual tokenizers cut too: their tokens are then those of the whole text, but for
the space that some put before any text. It knows characters, not tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from io import StringIO, TextIOWrapper
from pathlib import Path

LENGTH = 1 << 15  # characters of a piece, at most
LOOKED_AT = 1 << 12  # bytes in which a line or a word should begin
# Two spaces or line ends in a row are one token or two, by what stands behind them.
LINE = re.compile(r"(?<=\S)\r?\n(?=\S)")
WORD = re.compile(r"(?<=\S)(?= \S)")  # most tokenizers take a word with the space before it
GAP = re.compile(r"(?<=\S)(?=\s)")
LINE_BEGINS = re.compile(rb"\n(?=\S)")
WORD_BEGINS = re.compile(rb"\s(?=\S)")
CHARACTER_BEGINS = re.compile(rb"(?=[^\x80-\xbf])")


def of_document(text: str) -> Iterator[str]:
    """The pieces of a text, in order; joined they are the text."""
    return iter([text] if len(text) <= LENGTH else _pieces(StringIO(text).read, LENGTH))


def of_file(file: Path, start: int = 0, length: int = LENGTH) -> Iterator[tuple[str, int]]:
    """The pieces of a UTF-8 file from a byte on, each with the byte behind it in the file.

    As Python reads text, all kinds of line ends become one.

    Args:
        start: where a character begins.
        length: characters of a piece, at most.

    Raises:
        UnicodeDecodeError: a piece is not UTF-8.
    """
    with file.open("rb") as handle:
        handle.seek(start)
        with TextIOWrapper(handle, encoding="utf-8", newline="") as lines:
            for piece in _pieces(lines.read, length):
                start += len(piece.encode())
                yield piece.replace("\r\n", "\n").replace("\r", "\n"), start


def beginning(file: Path, place: int) -> int:
    """The byte where the first line at or behind a byte of a file begins.

    Where none begins soon, the first word; else the first character.
    """
    if place == 0:
        return 0
    with file.open("rb") as handle:
        handle.seek(place - 1)
        found = handle.read(LOOKED_AT)
    for begins in (LINE_BEGINS, WORD_BEGINS):
        if at := begins.search(found):
            return place - 1 + at.end()
    at = CHARACTER_BEGINS.search(found, 1)
    return place - 1 + (at.start() if at else len(found))


def _pieces(read: Callable[[int], str], length: int) -> Iterator[str]:
    held = read(length)
    while len(held) >= length:
        at = _cut(held)
        yield held[:at]
        held = held[at:]
        held += read(length - len(held))
    if held:
        yield held


def _cut(text: str) -> int:
    """Where to cut: in the second half the last line end, else the last space, else any gap."""
    for edges in (LINE, WORD, GAP):
        if found := [edge.end() for edge in edges.finditer(text, len(text) // 2)]:
            return found[-1]
    return len(text)
