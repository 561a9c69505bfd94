"""Triton kernels for every GPU with FP8 tensor cores: quantize, multiply, expand.

Importing this package does not import Triton; importing its kernel modules (`quantize`,
`multiply`, `expand`) does. Ask `available` first.
"""

from __future__ import annotations

from functools import cache

OLDEST = (3, 6)  # of Triton


@cache
def available() -> bool:
    """Whether the kernels can be imported: a Triton that is new enough, and whole."""
    try:
        import triton
    except ImportError:
        return False
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= OLDEST
