"""Converts a model into a packed checkpoint; see `pipeline.py`."""

from zqfp_convert.conversion.pipeline import convert, run
from zqfp_convert.conversion.result import Conversion, Progress

__all__ = ["Conversion", "Progress", "convert", "run"]
