"""Where products of float32 matrices may go over a GPU's tensor cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


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


def kept(matrix: Tensor) -> Tensor:
    """What tensor cores keep of a float32 matrix: 11 bits of each number; all of it on the CPU."""
    return rounded(matrix) if on_tensor_cores(matrix) else matrix


def on_tensor_cores(matrix: Tensor) -> bool:
    """Whether products of it may go there."""
    return matrix.is_cuda


def rounded(matrix: Tensor) -> Tensor:
    """A float32 matrix rounded to nearest numbers of 11 bits, for numbers below 1e34.

    Veltkamp's splitting (Dekker, "A floating-point technique for extending the available
    precision", Numer. Math. 18, 1971).
    """
    scaled = matrix * float((1 << 13) + 1)
    return scaled - (scaled - matrix)


class Parts(NamedTuple):
    """A float32 matrix in two parts, or several matrices `[..., N, S]`.

    Attributes:
        kept: what tensor cores keep of it.
        rest: the rest; None on the CPU, where there is none.
    """

    kept: Tensor
    rest: Tensor | None

    def like(self, view: Callable[[Tensor], Tensor]) -> Parts:
        """Those of a view of the matrix."""
        return Parts(view(self.kept), None if self.rest is None else view(self.rest))


def split(matrix: Tensor) -> Parts:
    """The parts of a float32 matrix."""
    if not on_tensor_cores(matrix):
        return Parts(matrix, None)
    high = rounded(matrix)
    return Parts(high, matrix - high)


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """A product of matrices `[N, S]`, `[S, M]` in which tensor cores round next to nothing."""
    return product_of_parts(split(left), split(right))


def product_of_parts(left: Parts, right: Parts) -> Tensor:
    """`float32_product` of two that are `split`: the rests go into products of their own."""
    product = left.kept @ right.kept
    if left.rest is not None and right.rest is not None:
        product.addmm_(left.rest, right.kept).addmm_(left.kept, right.rest)
    return product
