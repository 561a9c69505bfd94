"""The journal holds what was appended, whatever a crash does to its end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zqfp_convert.checkpoint.output.journal import Journal, Locked

RECORDS = [{"one": 1}, {"two": [0.1, "zwei\n", None]}, {"three": {"größe": 3}}]


def written(path: Path) -> bytes:
    journal = Journal(path)
    for record in RECORDS:
        journal.append(record)
    journal.close()
    return path.read_bytes()


def read(path: Path) -> list[object]:
    journal = Journal(path)
    journal.close()
    return list(journal.records)


def test_what_was_appended_is_there(tmp_path: Path) -> None:
    data = written(tmp_path / "journal")
    assert data.count(b"\n") == 3
    assert read(tmp_path / "journal") == RECORDS
    assert (tmp_path / "journal").read_bytes() == data


def test_cut_off_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    data = written(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        whole = data[:length].count(b"\n")
        journal = Journal(path)
        assert journal.records == RECORDS[:whole]
        assert path.read_bytes() == data[:length]  # opening changes nothing
        journal.append({"next": True})
        journal.close()
        assert read(path) == [*RECORDS[:whole], {"next": True}]


def test_a_damaged_line_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    data = written(path)
    for place in range(len(data)):
        for bit in (1, 64):
            changed = bytearray(data)
            changed[place] ^= bit
            path.write_bytes(changed)
            assert read(path) == RECORDS[: data[:place].count(b"\n")]
    path.write_bytes(data + bytes(4096))  # as some file systems leave it
    assert read(path) == RECORDS


def test_a_failed_append_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal")
    journal.append(RECORDS[0])
    real = os.write

    def some(handle: int, data: memoryview) -> int:
        if len(data) < 10:
            raise OSError("the disk is full")
        return real(handle, data[: len(data) // 2])

    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(os, "write", some)
        journal.append(RECORDS[1])
    assert journal.records == RECORDS[:1]
    journal.append(RECORDS[2])
    journal.close()
    assert read(tmp_path / "journal") == [RECORDS[0], RECORDS[2]]


def test_clearing(tmp_path: Path) -> None:
    written(tmp_path / "journal")
    journal = Journal(tmp_path / "journal")
    journal.clear()
    journal.append(RECORDS[2])
    journal.close()
    assert read(tmp_path / "journal") == RECORDS[2:]


def test_one_at_a_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    with pytest.raises(Locked):
        Journal(tmp_path / "journal")
    journal.close()
    Journal(tmp_path / "journal").close()
