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
from zqfp_convert.runtime.paths import HOPPER


def available(device: torch.device) -> bool:
    """Whether a device has such linears: those that it was measured on."""
    return (
        device.type == "cuda"
        and kernels.available()
        and torch.cuda.get_device_capability(device) == HOPPER
    )


def takes(layer: PackedLayer, dtype: torch.dtype) -> bool:
    """Whether there is such a linear for a layer, where it lies, in a model of that dtype."""
    return (
        layer.kind != "free"
        and layer.rank <= layout.MOST_RANKS
        and dtype == torch.bfloat16
        and available(layer.packed.device)
    )


class ResidentLinear(nn.Module):
    """`y = W^ x^ + B (s (A x^)) + bias` for a packed weight `[N, K]` that `takes` says yes to."""

    matrix: Tensor
    factor: Tensor
    lorc_A: Tensor | None
    lorc_B: Tensor | None
    lorc_scale: Tensor | None
    outer: Tensor | None
    input_offset: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: PackedLayer, bias: Tensor | None) -> None:
        """`bias` is `[N]`."""
        super().__init__()
        self.rows, self.columns = layer.rows, layer.columns
        matrix = layer.packed.new_empty(expanded.matrix_shape(layer.rows, layer.columns))
        about = layer.packed, layer.scale, layer.group_size
        expanded.expand(*about, matrix, layer.books, layer.choice)
        B = layer.lorc_B
        buffers = {
            "matrix": matrix,
            "factor": expanded.matrix_factor(layer.scale, layer.row_scale),
            "lorc_A": layer.lorc_A,
            "lorc_B": B,
            "lorc_scale": layer.lorc_scale,
            "outer": None,
            "input_offset": layer.input_offset,
            "bias": bias,
        }
        if B is not None and bias is None:  # for both parts of z
            buffers["outer"] = torch.cat([B.bfloat16().t()] * 2).contiguous()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`, bfloat16."""
        from zqfp_convert.runtime.kernels.portable.quantize import quantize

        tokens = x.reshape(-1, self.columns)
        lorc = None if self.lorc_A is None else (self.lorc_A, self.lorc_scale)
        alone = self.bias is None  # then no column of ones has to come beside the parts of z
        codes, scale, z = quantize(tokens, self.input_offset, lorc, parts=alone)
        matrix = self.matrix.view(fp8.DTYPE)
        y = expanded.product(codes, scale[:, None], matrix, self.factor, self.rows)
        if not alone:
            y = expanded.finish(y, z, self.lorc_B, self.bias, x.dtype)
        elif z is not None and self.outer is not None:
            y.addmm_(z, self.outer)
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
