"""Exports: a packed checkpoint in the formats of other programs.

`pipeline.py` is where to begin; each format has a file of its own.
"""

from zqfp_convert.exporting.pipeline import TARGETS, Export, export

__all__ = ["TARGETS", "Export", "export"]
