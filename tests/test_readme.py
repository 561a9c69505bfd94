"""What the README and the notes point at is there, and nothing in them was left open."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
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


def test_links_within_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]+)\)", text)
    assert links
    assert set(links) <= anchors


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
def test_the_picture_finds_its_figures(tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.png"
    script = ROOT / "tests" / "benchmarks" / "picture.py"
    subprocess.run([sys.executable, script, "--to", drawn], check=True)
    assert drawn.stat().st_size > 10_000


def test_the_files_that_commands_name() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    scripts = re.findall(r"python (\S+\.py)", text)
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)
