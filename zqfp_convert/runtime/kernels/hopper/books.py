"""Codebooks as the kernels take them: the E4M3 bytes of their magnitudes.

A kernel knows E2M1 by itself. It is compiled with BOOKS = 1 to take one or two others, between
which a bit beside each lift chooses (`table` in codebook.cuh).
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from zqfp_convert.numerics import codebook, fp8
from zqfp_convert.numerics.codebook import Codebook
from zqfp_convert.numerics.scales import MAX_SPAN

SECOND = 0x80  # beside a lift: the group has the second codebook
LOWEST_SHIFT = 6 - MAX_SPAN  # of the exponent, where the lift is 0


class BookFields(ctypes.Structure):
    """Of each codebook the bytes of its first four magnitudes and of its last four."""

    _fields_ = (("low", ctypes.c_uint32 * 2), ("high", ctypes.c_uint32 * 2))


def given(books: tuple[Codebook, ...]) -> bool:
    """Whether a kernel has to be told the codebooks."""
    return books != (codebook.E2M1,)


@cache
def fields(books: tuple[Codebook, ...]) -> BookFields:
    """Of one codebook or two; one is there twice."""
    out = BookFields()
    for place in range(2):
        magnitudes = torch.tensor(books[min(place, len(books) - 1)]) * 2.0**LOWEST_SHIFT
        codes = bytes(fp8.encode(magnitudes).view(torch.uint8).tolist())
        out.low[place] = int.from_bytes(codes[:4], "little")
        out.high[place] = int.from_bytes(codes[4:], "little")
    return out
