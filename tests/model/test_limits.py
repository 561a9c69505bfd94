"""The memory that control groups leave, by files as Linux shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from zqfp_convert.model import limits


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def left(tmp_path: Path, membership: str) -> int | None:
    (tmp_path / "cgroup").write_text(membership)
    return limits.left(tmp_path / "cgroup", tmp_path / "fs")


def test_the_narrowest_group_decides(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    stat = "anon 5\ninactive_file 100\nfile 300"
    group(root)
    group(root / "job", memory__max=10_000, memory__current=4_000, memory__stat=stat)
    group(root / "job" / "step", memory__max="max", memory__current=3_000, memory__stat=stat)
    assert left(tmp_path, "0::/job/step\n") == 10_000 - 4_000 + 100
    (root / "job" / "step" / "memory.max").write_text("3050\n")
    assert left(tmp_path, "0::/job/step\n") == 3_050 - 3_000 + 100
    (root / "job" / "memory.current").write_text("20000\n")
    assert left(tmp_path, "0::/job/step\n") == 0


def test_version_1(tmp_path: Path) -> None:
    usage = {"memory__usage_in_bytes": 1_000, "memory__stat": "cache 1\ntotal_inactive_file 7"}
    group(tmp_path / "fs" / "memory", memory__limit_in_bytes=(1 << 63) - 4096, **usage)
    group(tmp_path / "fs" / "memory" / "a", memory__limit_in_bytes=5_000, **usage)
    assert left(tmp_path, "5:cpu,cpuacct:/\n4:memory:/a\n") == 5_000 - 1_000 + 7
    assert left(tmp_path, "4:memory:/\n") is None


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    group(tmp_path / "fs", memory__max=900, memory__current=100, memory__stat="inactive_file 0")
    assert left(tmp_path, "0::/kubepods/pod1\n") == 800


@pytest.mark.parametrize("membership", ["0::/\n", "", "1:name=systemd:/\n", "0::/gone\n"])
def test_without_limits(membership: str, tmp_path: Path) -> None:
    group(tmp_path / "fs")
    assert left(tmp_path, membership) is None


def test_where_there_is_no_such_thing(tmp_path: Path) -> None:
    assert limits.left(tmp_path / "none", tmp_path) is None
