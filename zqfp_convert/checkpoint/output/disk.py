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
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
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
        if full:
            found, needed = "the disk is full", "room for the whole checkpoint"
            do = "Make room, or give an output folder on another disk."
        elif getattr(error, "errno", None) in FORBIDDEN:
            found, needed = f"cannot be written ({error})", "a folder that can be written"
            do = "Allow that, or give an output folder elsewhere."
        else:
            found, needed = f"cannot be written ({error})", "a disk that works"
            do = "Look at the disk, or at what connects it."
        raise OutputError(str(out), found, needed=needed, do=do) from error


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
