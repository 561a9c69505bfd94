"""Triton kernels of what is done to every weight and every activation of a conversion.

Importing this package does not import Triton; importing its modules does. Ask `available` first.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor

OLDEST = (3, 6)  # of Triton


@cache
def available() -> bool:
    """Whether Triton's kernels can be imported: it is new enough, and whole."""
    try:
        import triton
    except ImportError:
        return False
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= OLDEST


def take(tensor: Tensor) -> bool:
    """Whether the kernels work on this tensor: it lies on a GPU that Triton serves."""
    return tensor.is_cuda and available()
