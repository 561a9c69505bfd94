"""Which device work runs on, in which dtype, and how much memory it has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zqfp_convert.errors import OptionError
from zqfp_convert.model import limits


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device that a user means; the first GPU, else the CPU, when nothing is said.

    Raises:
        OptionError: no such device on this machine.
    """
    if device is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
        if wanted.type not in ("cpu", "cuda"):
            raise RuntimeError("neither the CPU nor a CUDA device")
    except (RuntimeError, AssertionError) as error:
        raise OptionError(
            "device",
            f"{device!s} ({str(error).splitlines()[0][:120]})",
            needed="a device of this machine, such as cpu or cuda:0",
            do="Give another device, or none for the best one there is.",
        ) from error
    if wanted.type == "cuda" and wanted.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return wanted


def compute_dtype(device: torch.device, stored: torch.dtype | None) -> torch.dtype:
    """The dtype to calibrate in: float32 on the CPU, the stored dtype on accelerators."""
    if device.type == "cpu" or stored is None:
        return torch.float32
    return stored


def describe(device: torch.device) -> str:
    """What kind of device it is, as far as it decides over the last bits of a result."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})"


def settle_libraries() -> None:
    """Choose what a library takes over from the environment when it is used first.

    cuBLAS gives the same bits each time with workspaces of a fixed size alone.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """While this context is open, the same work gives the same bits: deterministic algorithms.

    `threads` of the CPU share the work, as sums are split up among them. Where torch has no
    deterministic algorithm, it warns.
    """
    deterministic: Any = torch.utils.deterministic
    settle_libraries()
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )
    torch.set_num_threads(threads)  # always: the libraries then use no fewer of their own accord
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # nothing here reads it
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
        deterministic.fill_uninitialized_memory = before[3]
        torch.backends.cudnn.benchmark = before[4]
        if threads != before[0]:
            torch.set_num_threads(before[0])


def too_little_memory(
    host: int, device: torch.device, on_device: int
) -> tuple[str, str, str] | None:
    """The first place with less free memory than the bytes needed: where, found and needed."""
    for place, estimate in ((torch.device("cpu"), host), (device, on_device)):
        free = free_memory(place)
        if free is not None and estimate > free:
            found, needed = f"{free / 1e6:,.0f} MB free", f"about {estimate / 1e6:,.0f} MB"
            return f"memory of {place}", found, needed
    return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    found, allowed = _available(), limits.left()
    return min((one for one in (found, allowed) if one is not None), default=None)


def _available() -> int | None:
    """Bytes of host memory that the system has."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable:"))
            return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
