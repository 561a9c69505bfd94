"""How much memory the system's control groups leave to this process (Linux, cgroups(7)).

In a container the host may have memory that its processes cannot have.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MEMBERSHIP, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
ENDLESS = 1 << 60  # bytes from which on version 1 means no limit


def left(membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> int | None:
    """Bytes that the narrowest group around this process still allows; None without a limit.

    Pages of files that were not used lately count as free: they make room for others.
    """
    found = [one for folder, names in _folders(membership, mount) for one in _left(folder, *names)]
    return min(found, default=None)


def _folders(membership: Path, mount: Path) -> Iterator[tuple[Path, tuple[str, str]]]:
    """The groups from the process's own to the outermost, and what limit and usage are called."""
    try:
        lines = membership.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, names = mount, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = mount / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        own = root / path.lstrip("/")  # not there where a container sees its own group as the root
        yield from (
            (folder, names) for folder in (own, *own.parents) if folder.is_relative_to(root)
        )


def _left(folder: Path, limit: str, usage: str) -> Iterator[int]:
    """What a group allows, if it has a limit."""
    try:
        most = (folder / limit).read_text(encoding="ascii").strip()
        if most == "max" or int(most) >= ENDLESS:
            return
        used = int((folder / usage).read_text(encoding="ascii"))
        with (folder / "memory.stat").open(encoding="ascii") as lines:
            numbers = dict(line.split() for line in lines)
        idle = int(numbers.get("total_inactive_file", numbers.get("inactive_file", 0)))
    except (OSError, ValueError):
        return
    yield max(0, int(most) - used + idle)
