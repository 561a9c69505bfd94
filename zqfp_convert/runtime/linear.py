"""The quantized linear layer: weights stay packed, the way to multiply is chosen for each call."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.errors import OptionError
from zqfp_convert.numerics import fp8
from zqfp_convert.runtime import expanded, reference

Path = Literal["expanded", "reference"]
PATH_VARIABLE = "ZQFP_PATH"


class Scratch:
    """A buffer for the expanded matrix of one layer at a time, shared by all layers of a model."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Tensor] = {}

    def matrix(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """An uninitialised uint8 `[rows, columns]` on the device; earlier ones lose their data."""
        buffer = self._buffers.get(device)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = torch.empty(rows * columns, dtype=torch.uint8, device=device)
            self._buffers[device] = buffer
        return buffer[: rows * columns].view(rows, columns)


class QuantizedLinear(nn.Module):
    """`y = W^ x^ + B (s (A x^)) + bias` for a packed weight `[N, K]`.

    `ZQFP_PATH=expanded|reference` in the environment forces a path.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_row_scale: Tensor | None
    lorc_A: Tensor | None
    lorc_B: Tensor | None
    lorc_scale: Tensor | None
    input_offset: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        layer: PackedLayer,
        bias: Tensor | None,
        scratch: Scratch,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`dtype` is that of the model around, and of `weight` for code that asks for it."""
        super().__init__()
        self.dtype = dtype
        self.name, self.kind, self.group_size = layer.name, layer.kind, layer.group_size
        self.in_features, self.out_features = layer.columns, layer.rows
        self.register_buffer("weight_packed", layer.packed)
        self.register_buffer("weight_scale", layer.scale)
        self.register_buffer("weight_row_scale", layer.row_scale)
        self.register_buffer("lorc_A", layer.lorc_A)
        self.register_buffer("lorc_B", layer.lorc_B)
        self.register_buffer("lorc_scale", layer.lorc_scale)
        self.register_buffer("input_offset", layer.input_offset)
        self.register_buffer("bias", bias)
        self._scratch = scratch

    def packed(self) -> PackedLayer:
        """The layer's tensors as they lie on disk (sharing memory)."""
        return PackedLayer(
            self.name,
            self.kind,
            self.group_size,
            self.in_features,
            self.weight_packed,
            self.weight_scale,
            self.weight_row_scale,
            self.lorc_A,
            self.lorc_B,
            self.lorc_scale,
            self.input_offset,
        )

    @property
    def weight(self) -> Tensor:
        """The weight `[N, K]` it stands for, LoRC included, made anew at each call.

        For models that read the weight of a linear themselves instead of calling it.
        """
        layer = self.packed()
        compensation = layer.lorc_product()
        weight = layer.dequantize()
        return (weight if compensation is None else weight + compensation).to(self.dtype)

    def path(self, x: Tensor) -> Path:
        """The way to multiply for an input.

        Raises:
            OptionError: `ZQFP_PATH` names no path, or one that this device or dtype cannot take.
        """
        possible = (
            self.kind != "free"
            and x.dtype in (torch.bfloat16, torch.float16)
            and expanded.available(x.device)
        )
        forced = os.environ.get(PATH_VARIABLE)
        if forced is None:
            return "expanded" if possible else "reference"
        if forced == "reference" or (forced == "expanded" and possible):
            return forced  # type: ignore[return-value]
        known = forced == "expanded"
        raise OptionError(
            f"{PATH_VARIABLE}={forced}",
            f"{self.kind} scales, {x.dtype} on {x.device}" if known else "no such path",
            needed="a GPU with FP8 (compute capability 8.9), bfloat16 or float16 activations and "
            "scales m1 or m2" if known else "expanded or reference",
            do=f"Unset {PATH_VARIABLE}.",
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]` in the dtype of x."""
        if self.path(x) == "expanded":
            return self._expanded(x)
        layer = self.packed()
        factors = layer.lorc_factors()
        return reference.linear(x, layer.dequantize(), factors, self.bias, self.input_offset)

    def _expanded(self, x: Tensor) -> Tensor:
        rows = self.out_features + -self.out_features % expanded.ALIGNMENT
        columns = self.in_features + -self.in_features % expanded.ALIGNMENT
        matrix = self._scratch.matrix(rows, columns, x.device)
        expanded.expand(self.weight_packed, self.weight_scale, self.group_size, matrix)
        factor = expanded.row_factor(self.weight_scale, self.weight_row_scale)
        factor = nn.functional.pad(factor, (0, rows - self.out_features), value=1.0)
        lorc = None
        if self.lorc_A is not None and self.lorc_B is not None:
            lorc = (self.lorc_A, self.lorc_B, self.lorc_scale)
        return expanded.linear(
            x,
            matrix.view(fp8.DTYPE),
            self.out_features,
            factor,
            lorc,
            self.bias,
            self.input_offset,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves between devices; casts (`model.half()`) leave the packed tensors as they are."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        group = "row" if self.group_size == self.in_features else self.group_size
        rank = 0 if self.lorc_A is None else self.lorc_A.shape[0]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scales={self.kind}, group_size={group}, rank={rank}, bias={self.bias is not None}"
        )
