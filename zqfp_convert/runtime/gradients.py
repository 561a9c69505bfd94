"""Gradients through packed layers, to what lies before them or beside them; weights have none."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Multiplies(Protocol):
    """What a packed layer is to its gradient."""

    @property
    def weight(self) -> Tensor:
        """`[N, K]`, low-rank factors included."""

    def _multiply(self, x: Tensor) -> Tensor: ...


class StraightThrough(torch.autograd.Function):
    """A packed layer on whatever path, and `W~^T g` for its gradient.

    The activations' rounding to FP8 counts as the identity (straight-through estimator,
    arXiv:1308.3432); for the rounded ones the gradient is exact.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Multiplies) -> Tensor:
        """`[..., K]` to `[..., N]`, as without gradients."""
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer._multiply(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """`[..., N]` to `[..., K]`; the weight is dequantized for it, and dropped."""
        weight = ctx.layer.weight
        return (gradient.to(weight.dtype) @ weight).to(ctx.dtype), None
