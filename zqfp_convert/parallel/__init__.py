"""Several processes, each with a GPU, that do one piece of work together; see `world.py`."""

from zqfp_convert.parallel.lacking import lacking
from zqfp_convert.parallel.world import ALONE, OutOfMemory, Share, World, join

__all__ = ["ALONE", "OutOfMemory", "Share", "World", "join", "lacking"]
