"""Which device work runs on, in which dtype, and how much memory it has."""

from __future__ import annotations

import os

import torch

from zqfp_convert.errors import OptionError


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
