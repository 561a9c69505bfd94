"""Memory that is lacking, whoever says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SAID = (  # by libraries, and by CUDA itself when host memory is to be locked
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_NOT_INITIALIZED",  # as it makes its workspace then
    "CUDA error: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)


@contextmanager
def lacking() -> Iterator[None]:
    """Turns what is raised for want of memory in the body into `torch.OutOfMemoryError`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if any(said in str(error) for said in SAID):
            raise torch.OutOfMemoryError(str(error).splitlines()[0]) from None
        raise
