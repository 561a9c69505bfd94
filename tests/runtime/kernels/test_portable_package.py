"""The package is whole without Triton."""

from __future__ import annotations

import subprocess
import sys

from zqfp_convert.runtime.kernels import portable

WITHOUT = """
import sys
sys.modules["triton"] = None
import zqfp_convert
from zqfp_convert.runtime.kernels import portable
from zqfp_convert.runtime.kernels.portable import layout, tiles
assert not portable.available()
"""

UNASKED = """
import sys
from zqfp_convert.runtime.kernels import portable
from zqfp_convert.runtime.kernels.portable import layout, tiles
assert "triton" not in sys.modules
assert portable.available()
"""


def test_it_is_available_here() -> None:
    assert portable.available()


def test_without_triton() -> None:
    for program in (WITHOUT, UNASKED):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
