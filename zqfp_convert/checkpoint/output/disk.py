"""Files written through to the disk, and what is wrong where they cannot be written."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from zqfp_convert.errors import OutputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TO_SAFETENSORS = tuple(f"(os error {number})" for number in FULL)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Says what is wrong where something of the output `out` cannot be written.

    Raises:
        OutputError: for an error of the system.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        told = any(code in str(error) for code in FULL_TO_SAFETENSORS)
        full = getattr(error, "errno", None) in FULL or told
        raise OutputError(
            str(out),
            "the disk is full" if full else f"cannot be written ({error})",
            needed="room for the whole checkpoint" if full else "a folder that can be written",
            do="Make room and give the same command again: it goes on where it stopped. Or give "
            "an output folder on another disk."
            if full
            else "Make room, or give an output folder on another disk.",
        ) from error


def sync(path: Path) -> None:
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


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
