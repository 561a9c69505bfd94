"""What this process takes of memory: given back at once on the host, and measured."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MMAP_THRESHOLD, ARENA_MAX = -3, -8  # malloc.h of glibc
LARGE = 1 << 20  # bytes from which on a tensor has pages of its own
HEAPS = 2  # the main thread's, and one for all others
PROCESS = Path("/proc/self")
RESET_PEAK = "5"  # proc(5), clear_refs


@contextmanager
def given_back() -> Iterator[None]:
    """While this context is open, memory that is not used any more soon goes to the system.

    By itself glibc raises the size up to which it keeps tensors in heaps, one for each thread, to
    that of the largest one that was ever freed; heaps with holes then grow with every block. From
    here on large ones have pages of their own, and threads that come share a heap, for holes in
    many of them add up. Nothing happens with other libraries.

    Objects that are there now are not looked at by `tidy`, which would take a tenth of a second.
    """
    _call("mallopt", MMAP_THRESHOLD, LARGE)
    _call("mallopt", ARENA_MAX, HEAPS)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def tidy() -> None:
    """Let go of cycles that hold tensors, and of what lies unused in the C library's heaps."""
    gc.collect()
    trim()


def trim() -> None:
    """Let go of what lies unused in the C library's heaps."""
    _call("malloc_trim", 0)


def give_back(device: torch.device) -> None:
    """Let go of what a try that ran out of memory has left."""
    tidy()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _call(name: str, *numbers: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*numbers)


_before_reset: dict[torch.device, int] = {}  # the highest peaks that were measured apart


def taken_by(work: Callable[[], object], device: torch.device) -> int:
    """The peak of a GPU's memory while `work` runs, above what is taken before, in bytes."""
    highest = torch.cuda.max_memory_allocated(device)
    _before_reset[device] = max(highest, _before_reset.get(device, 0))
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


class Peak:
    """The peaks of this process's memory above what it has when this is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host_before: int | None = None
        tidy()  # what is free in the heaps is not what the process has
        try:
            (PROCESS / "clear_refs").write_text(RESET_PEAK)
            self._host_before = _status("VmRSS")
        except (OSError, StopIteration):  # no Linux, or no right to
            pass
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            _before_reset.pop(device, None)
            self._device_before = torch.cuda.memory_allocated(device)

    def host(self) -> int | None:
        """Bytes of resident memory; None where the system does not tell."""
        if self._host_before is None:
            return None
        return max(0, _status("VmHWM") - self._host_before)

    def device(self) -> int | None:
        """Bytes of tensors on a GPU; None on the CPU."""
        if self._device.type != "cuda":
            return None
        highest = torch.cuda.max_memory_allocated(self._device)
        return max(highest, _before_reset.get(self._device, 0)) - self._device_before


def _status(field: str) -> int:
    with (PROCESS / "status").open(encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
