"""What the README and the notes point at is there, and nothing in them was left open."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = ["README.md", "CHANGELOG.md", "tests/benchmarks/NOTES.md", "formats/zqfp-1.md"]


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_placeholders(name: str) -> None:
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"@[A-Z]+@|TODO|FIXME", text)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_files_that_commands_name() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    scripts = re.findall(r"python (\S+\.py)", text)
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)
