"""A layer's E4M3 matrix from its chunks, for products through `torch._scaled_mm`."""

from __future__ import annotations

import ctypes
from functools import cache

from torch import Tensor

from zqfp_convert.runtime.kernels.hopper.books import BookFields, fields, given
from zqfp_convert.runtime.kernels.hopper.driver import Kernel
from zqfp_convert.runtime.kernels.hopper.layout import Chunks

DEPTH = 4  # chunks that a block takes


class _Problem(ctypes.Structure):
    _fields_ = (
        ("chunks", ctypes.c_void_p),
        ("matrix", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("depth", ctypes.c_int),
        ("books", BookFields),
    )


@cache
def _kernel(device: int, groups: int, books: bool) -> Kernel:
    return Kernel("expand", {"GROUPS": groups, "BOOKS": books, "DEPTH": DEPTH})


def expand(chunks: Chunks, matrix: Tensor) -> None:
    """Write the matrix.

    Args:
        chunks: the weights `[N, K]`.
        matrix: uint8 `[N', K']`, contiguous, K' a multiple of 16, neither more than fills the
            chunks; zeros beyond N and K.
    """
    tiles, depth, _ = chunks.data.shape
    data, books = chunks.data.data_ptr(), chunks.books
    problem = _Problem(data, matrix.data_ptr(), *matrix.shape, depth, fields(books))
    kernel = _kernel(matrix.device.index or 0, chunks.groups, given(books))
    # No overlap: the kernel ahead may still read the matrix of another layer from there.
    kernel.launch(problem, (-(-depth // DEPTH), tiles), 128, overlap=False)
