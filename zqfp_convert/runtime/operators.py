"""Makes a way to multiply one operator of torch, `zqfp::<name>`.

So torch.compile takes it as a whole: what it decides by the number of tokens, and what it launches,
is never traced. The operators have no gradients: `gradients.py` has the layers'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", Tensor, list[Tensor])


def register(name: str, work: Callable[..., Result]) -> Callable[..., Result]:
    """Register the operator, and return it.

    Args:
        name: in the namespace `zqfp`.
        work: takes x `[M, K]` and N first, and gives a new, contiguous `[M, N]` in the dtype of x,
            or takes several N and gives as many; the schema is read off its annotations.
    """
    qualified = f"zqfp::{name}"
    # Not `custom_op`, which costs 9 us a call more, for gradients and checks.
    torch.library.define(qualified, torch.library.infer_schema(work, mutates_args=()))
    torch.library.impl(qualified, "default", work)
    torch.library.register_fake(qualified, result)
    operator: Callable[..., Result] = getattr(torch.ops.zqfp, name).default
    return operator


def result(x: Tensor, rows: int | Sequence[int], *others: object) -> Any:
    """What every operator gives: uninitialised `[M, N]` in the dtype of x, on its device."""
    if isinstance(rows, Sequence):
        return [x.new_empty(x.shape[0], count) for count in rows]
    return x.new_empty(x.shape[0], rows)
