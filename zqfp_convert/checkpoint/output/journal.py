"""An append-only journal: each line a checksum and a JSON object, on the disk before work goes on.

A crash may cut the last line off. What counts is up to the last whole line; the rest is overwritten
by what comes next. Whoever has a journal open holds a lock on it.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: two runs into one folder are not kept apart there
    fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]


class Locked(Exception):  # noqa: N818 (the caller says what is wrong)
    """Another process has the journal open."""


class Journal:
    """A journal in a file.

    Attributes:
        path: of the file.
        records: the whole ones, in order.
    """

    def __init__(self, path: Path) -> None:
        """Open a journal, or begin one; what it holds is left as it is.

        Raises:
            Locked: another process has it open.
            OSError: it cannot be opened.
        """
        self.path = path
        self._handle = _open_locked(path)
        self.records, self._end = _whole_records(self._handle)
        self._appending = threading.Lock()

    def append(self, record: Record) -> None:
        """Write a record of JSON values through to the disk.

        Raises:
            OSError: it could not be written; the journal is what it was before.
        """
        text = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        line = _checksum(text) + b" " + text + b"\n"
        with self._appending:
            os.ftruncate(self._handle, self._end)
            os.lseek(self._handle, self._end, os.SEEK_SET)
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
            os.fsync(self._handle)
            self._end += len(line)
            self.records.append(record)

    def clear(self) -> None:
        """Forget all records."""
        os.ftruncate(self._handle, 0)
        os.fsync(self._handle)
        self.records, self._end = [], 0

    def close(self) -> None:
        """Close the file and release the lock."""
        os.close(self._handle)


class Followed:
    """What the journal of another process, which this one follows, holds.

    Attributes:
        path: of the file.
        records: those that the other process has written, too.
    """

    def __init__(self, path: Path, records: list[Record]) -> None:
        self.path, self.records = path, records

    def append(self, record: Record) -> None:
        """Take note of what the other one writes."""
        self.records.append(record)

    def clear(self) -> None:
        """Forget all records."""
        self.records = []

    def close(self) -> None:
        """Nothing is open."""


def _open_locked(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise Locked from None
        except OSError:  # a file system without locks
            pass
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
        os.close(handle)  # whoever held the lock has removed the file meanwhile


def _whole_records(handle: int) -> tuple[list[Record], int]:
    """The records up to the first that is damaged or cut off, and where they end."""
    with os.fdopen(os.dup(handle), "rb") as file:
        file.seek(0)
        records: list[Record] = []
        end = 0
        for line in file:
            checksum, _, text = line.removesuffix(b"\n").partition(b" ")
            if not line.endswith(b"\n") or checksum != _checksum(text):
                break
            records.append(json.loads(text))
            end += len(line)
    return records, end


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)
