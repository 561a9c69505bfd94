"""What one of several ranks has of a packed layer. Knows nothing of vLLM."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.numerics import bits


def of_rows(layer: PackedLayer, first: int, count: int) -> PackedLayer:
    """Output features `first` to `first + count` of a layer."""
    here = slice(first, first + count)

    def of(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[here]

    choice = None if layer.choice is None else bits.unpack(layer.choice, layer.rows)
    return replace(
        layer,
        packed=layer.packed[here],
        scale=layer.scale[here],
        row_scale=of(layer.row_scale),
        lorc_B=of(layer.lorc_B),
        choice=None if choice is None else bits.pack(choice[here]),
    )


def of_columns(layer: PackedLayer, first: int, count: int) -> PackedLayer:
    """Input features `first` to `first + count`: an even number of them, and whole groups.

    Where a group is a whole row, a part of it has the row's scale.
    """
    here = slice(first, first + count)
    scale, choice, size = layer.scale, layer.choice, min(layer.group_size, count)
    if scale.shape[1] > 1:
        groups = slice(first // size, -(-(first + count) // size))
        scale = scale[:, groups]
        choice = None if choice is None else choice[:, groups]
    A, offset = layer.lorc_A, layer.input_offset
    return replace(
        layer,
        columns=count,
        group_size=size,
        packed=layer.packed[:, first // 2 : -(-(first + count) // 2)],
        scale=scale,
        lorc_A=None if A is None else A[:, here],
        input_offset=None if offset is None else offset[here],
        choice=choice,
    )


def apart(layer: PackedLayer, device: torch.device) -> PackedLayer:
    """The same on a device, contiguous, and in memory that it shares with nobody."""
    tensors: dict[str, Any] = {k: v for k, v in vars(layer).items() if isinstance(v, Tensor)}
    whole = torch.contiguous_format
    copies = {k: v.to(device, copy=True, memory_format=whole) for k, v in tensors.items()}
    return replace(layer, **copies)
