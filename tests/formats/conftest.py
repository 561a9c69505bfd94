"""Puts the format's reader and the maker of its vectors where the tests can import them.

Both are plain files outside the package, and must work without it.
"""

from __future__ import annotations

import sys
from pathlib import Path

FORMATS = Path(__file__).parents[2] / "formats"
sys.path[:0] = [str(FORMATS), str(FORMATS / "vectors")]
