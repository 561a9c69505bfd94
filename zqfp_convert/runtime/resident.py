"""A quantized linear whose exact FP8 matrix stays in memory, for many tokens again and again.

It is the expanded path with twice the memory of packed weights, and nothing to expand at a call:
what a conversion's own passes through quantized blocks take. Activations are quantized by a Triton
kernel, so it takes no CUDA C++ to be compiled first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.numerics import fp8, kernels
from zqfp_convert.runtime import expanded
from zqfp_convert.runtime.kernels.portable import layout


def takes(layer: PackedLayer, dtype: torch.dtype) -> bool:
    """Whether there is such a linear for a layer, where it lies, in a model of that dtype."""
    return (
        layer.kind != "free"
        and layer.rank <= layout.MOST_RANKS
        and dtype == torch.bfloat16
        and kernels.take(layer.packed)
        and expanded.available(layer.packed.device)
    )


class ResidentLinear(nn.Module):
    """`y = W^ x^ + B (s (A x^)) + bias` for a packed weight `[N, K]` that `takes` says yes to."""

    matrix: Tensor
    factor: Tensor
    lorc_A: Tensor | None
    lorc_B: Tensor | None
    lorc_scale: Tensor | None
    input_offset: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: PackedLayer, bias: Tensor | None) -> None:
        """`bias` is `[N]`."""
        super().__init__()
        self.rows, self.columns = layer.rows, layer.columns
        shape = expanded.matrix_shape(layer.rows, layer.columns)
        matrix = layer.packed.new_empty(shape)
        about = layer.packed, layer.scale, layer.group_size
        expanded.expand(*about, matrix, layer.books, layer.choice)
        factor = expanded.row_factor(layer.scale, layer.row_scale)
        factor = nn.functional.pad(factor, (0, shape[0] - layer.rows), value=1.0)
        buffers = {
            "matrix": matrix,
            "factor": factor,
            "lorc_A": layer.lorc_A,
            "lorc_B": layer.lorc_B,
            "lorc_scale": layer.lorc_scale,
            "input_offset": layer.input_offset,
            "bias": bias,
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]` in the dtype of x."""
        from zqfp_convert.runtime.kernels.portable.quantize import quantize

        lorc = None if self.lorc_A is None else (self.lorc_A, self.lorc_scale)
        codes, scale, z = quantize(x.reshape(-1, self.columns), self.input_offset, lorc)
        matrix = self.matrix.view(fp8.DTYPE)
        y = expanded.product(codes, scale[:, None], matrix, self.factor, self.rows)
        y = expanded.finish(y, z, self.lorc_B, self.bias, x.dtype)
        return y.reshape(*x.shape[:-1], self.rows)

    @property
    def weight(self) -> Tensor:
        """The weight `[N, K]` it stands for, LoRC included, bfloat16, made anew at each call.

        For models that read the weight of a linear themselves instead of calling it.
        """
        codes = self.matrix.view(fp8.DTYPE)[: self.rows, : self.columns]
        weight = fp8.decode(codes) * self.factor[: self.rows, None]
        if self.lorc_A is not None and self.lorc_B is not None:
            A = self.lorc_A.float()
            A = A if self.lorc_scale is None else A * self.lorc_scale[:, None]
            weight += self.lorc_B.float() @ A
        return weight.bfloat16()
