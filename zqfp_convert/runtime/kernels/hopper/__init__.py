"""CUDA C++ kernels for Hopper (compute capability 9.0), compiled as they are needed by NVRTC."""

from __future__ import annotations

from functools import cache

from zqfp_convert.runtime.kernels.hopper import compiler


@cache
def available() -> bool:
    """Whether NVRTC can be loaded."""
    try:
        compiler.library()
    except compiler.CompilerError:
        return False
    return True
