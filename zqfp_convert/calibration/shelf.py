"""Batches of hidden states that lie where there is room for them: host memory, or a file.

To those who compute a shelf is a sequence of tensors on their device. What is put there is copied,
what is taken is a copy or lies in the file, so the bytes are the same wherever it stands.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, MutableSequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from zqfp_convert.checkpoint.output.disk import writing

UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that cannot be asked
CHUNK = 1 << 22  # bytes


class Shelf(MutableSequence[Tensor]):
    """Batches that are taken to a device one at a time."""

    def __init__(self, device: torch.device, file: Path | None = None) -> None:
        """In host memory, locked in place where a GPU copies from it; or in a file, made anew."""
        self._device, self._file = device, file
        self._stored: list[Tensor] = []
        self._end = 0  # of what lies in the file, in bytes
        if file is not None:
            file.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._stored)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> MutableSequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | MutableSequence[Tensor]:
        if isinstance(index, slice):
            return [stored.to(self._device) for stored in self._stored[index]]
        return self._stored[index].to(self._device)

    @overload
    def __setitem__(self, index: int, value: Tensor) -> None: ...
    @overload
    def __setitem__(self, index: slice, value: Iterable[Tensor]) -> None: ...
    def __setitem__(self, index: int | slice, value: Tensor | Iterable[Tensor]) -> None:
        assert isinstance(index, int)
        assert isinstance(value, Tensor)
        stored = self._stored[index]
        if stored.shape != value.shape or stored.dtype != value.dtype:
            stored = self._stored[index] = self._room(value)
        stored.copy_(value)

    def __delitem__(self, index: int | slice) -> None:
        del self._stored[index]

    def insert(self, index: int, value: Tensor) -> None:
        """Put a batch there.

        Raises:
            OutputError: the disk is full, or the file cannot be written.
        """
        stored = self._room(value)
        stored.copy_(value)
        self._stored.insert(index, stored)

    def split(self, size: int, dimension: int) -> None:
        """Make batches of at most so many windows out of the larger ones, where they lie."""
        parts = (torch.split(stored, size, dimension) for stored in self._stored)
        self._stored = [part for batch in parts for part in batch]

    def _room(self, value: Tensor) -> Tensor:
        """As much room as a tensor takes."""
        if self._file is None:
            locked = self._device.type == "cuda"
            return torch.empty(value.shape, dtype=value.dtype, pin_memory=locked)
        with writing(self._file), self._file.open("r+b" if self._end else "wb") as file:
            _take(file.fileno(), self._end, value.nbytes)
        whole = torch.from_file(
            str(self._file), shared=True, size=self._end + value.nbytes, dtype=torch.uint8
        )
        part = whole[self._end :].view(value.dtype).view(value.shape)
        self._end += value.nbytes
        return part


def _take(file: int, start: int, size: int) -> None:
    """Have so many bytes of the disk from an offset on, the end of a file, or fail.

    A hole in a mapped file would be found to have no room when somebody writes there, and the
    system kills them for it.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, start, size)
        except OSError as error:
            if error.errno not in UNKNOWN:
                raise
        else:
            return
    os.lseek(file, start, os.SEEK_SET)
    while size:
        size -= os.write(file, bytes(min(size, CHUNK)))
