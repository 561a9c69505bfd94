"""Where products of float32 matrices may go over a GPU's tensor cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def tensor_cores() -> Iterator[None]:
    """While this context is open, GPUs round the factors of float32 products to 11 bits (TF32).

    Sums stay float32. That is for products which say how far to move a weight that is then rounded
    to 4 bits, and for errors that are reported; factorizations are no products.
    """
    settings: Any = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(settings, "fp32_precision") else "allow_tf32"
    before = getattr(settings, name)
    setattr(settings, name, "tf32" if name == "fp32_precision" else True)
    try:
        yield
    finally:
        setattr(settings, name, before)
