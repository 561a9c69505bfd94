"""Host memory of whole conversions: as planned, and the same for any number of blocks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEMORY = Path(__file__).parents[1] / "benchmarks" / "memory.py"
ROUNDED = ["--recipe", "fast", "--hidden", "768"]


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_memory_is_as_planned_and_does_not_depend_on_the_number_of_blocks() -> None:
    """60 and 117 MB of weights. Heaps have holes, other ones in each run: some 5 MB."""
    command = [sys.executable, str(MEMORY), *ROUNDED, "--blocks", "4", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    few, many = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert many["bytes"] > 1.9 * few["bytes"]
    assert abs(many["peak"] - few["peak"]) < 8_000_000
    for row in (few, many):
        assert 0.85 < row["planned"] / row["peak"] < 1.5  # of so small a model
