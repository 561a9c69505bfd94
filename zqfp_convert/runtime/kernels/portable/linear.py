"""A quantized linear on any GPU with FP8: its arranged weights, and the operator that multiplies.

Imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.numerics import codebook, fp8
from zqfp_convert.numerics.kernels.casts import on
from zqfp_convert.runtime import expanded, operators
from zqfp_convert.runtime.kernels.portable import layout
from zqfp_convert.runtime.kernels.portable.expand import expand
from zqfp_convert.runtime.kernels.portable.multiply import multiply
from zqfp_convert.runtime.kernels.portable.quantize import quantize
from zqfp_convert.runtime.scratch import scratch as scratch_of

FUSED_TOKENS = 512  # with more, unpacking the weights once and for all pays


class PortableWeights(nn.Module):
    """The one copy of a layer's weights, in the kernels' order, and all that goes with it.

    None of its buffers are saved: the layer around it saves them as they lie on disk.
    """

    weights: Tensor
    shifts: Tensor
    row_top: Tensor
    row_factor: Tensor
    bias: Tensor | None
    input_offset: Tensor | None
    lorc_A: Tensor | None
    lorc_B: Tensor | None
    lorc_scale: Tensor | None

    def __init__(self, layer: PackedLayer, bias: Tensor | None) -> None:
        super().__init__()
        self.rows, self.columns, self.group_size = layer.rows, layer.columns, layer.group_size
        self.magnitudes = [magnitude for book in layer.books for magnitude in book]
        weights, shifts = layout.arrange(
            layer.packed, layer.scale, layer.group_size, layer.columns, layer.choice
        )
        buffers = {
            "weights": weights,
            "shifts": shifts,
            "row_top": layer.scale.amax(1),  # uint8 [N]: the largest exponent byte
            "row_factor": expanded.row_factor(layer.scale, layer.row_scale),
            "bias": bias,
            "input_offset": layer.input_offset,
            "lorc_A": layer.lorc_A,
            "lorc_B": layer.lorc_B,
            "lorc_scale": layer.lorc_scale,
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def multiply(self, x: Tensor, way: str, scratch: int) -> Tensor:
        """`[M, K]` to `[M, N]`; `way` is fused, expanded or auto."""
        return operator(
            x,
            self.rows,
            self.weights,
            self.shifts,
            self.group_size,
            self.row_factor,
            self.bias,
            self.input_offset,
            self.lorc_A,
            self.lorc_B,
            self.lorc_scale,
            self.magnitudes,
            way,
            scratch,
        )

    def prefers_expanded(self, tokens: int, dtype: torch.dtype) -> bool:
        """What `auto` means for M tokens of a dtype."""
        return tokens > FUSED_TOKENS

    def restore(self) -> tuple[Tensor, Tensor]:
        """The canonical tensors: packed uint8 `[N, ceil(K / 2)]`, exponents uint8 `[N, G]`."""
        packed, below = layout.restore(self.weights, self.shifts, self.group_size, self.columns)
        return packed, self.row_top[:, None] - below


def _work(
    x: Tensor,
    rows: int,
    weights: Tensor,
    shifts: Tensor,
    group_size: int,
    row_factor: Tensor,
    bias: Tensor | None,
    input_offset: Tensor | None,
    lorc_A: Tensor | None,
    lorc_B: Tensor | None,
    lorc_scale: Tensor | None,
    magnitudes: Sequence[float],
    way: str,
    scratch: int,
) -> Tensor:
    """The whole of `y = W^ x^ + B (s (A x^)) + bias`.

    Args:
        x: bfloat16 or float16 `[M, K]`.
        rows: N.
        weights, shifts, group_size: from `layout.arrange`.
        row_factor: float32 `[N]`.
        bias: `[N]`, or None.
        input_offset: `[K]`, or None.
        lorc_A, lorc_B, lorc_scale: the low-rank factors as they lie on disk, or None.
        magnitudes: of one codebook after another.
        way: fused, expanded, or auto: by the number of tokens.
        scratch: key of the buffer for the expanded path.
    """
    tokens, columns = x.shape
    if not tokens:
        return x.new_empty(0, rows)
    books = codebook.split(magnitudes)
    codes, scale, z = quantize(x, input_offset, None if lorc_A is None else (lorc_A, lorc_scale))
    if way == "fused" or (way == "auto" and tokens <= FUSED_TOKENS):
        lorc = None if lorc_B is None or z is None else (lorc_B, z)
        about = weights, shifts, group_size, row_factor, lorc, bias, x.dtype
        return multiply(codes, scale, *about, books=books)
    matrix = scratch_of(scratch).matrix(*expanded.matrix_shape(rows, columns), x.device)
    expand(weights, shifts, group_size, matrix, books)
    factor = torch.nn.functional.pad(row_factor, (0, matrix.shape[0] - rows), value=1.0)
    with on(x):
        y = expanded.product(codes, scale[:, None], matrix.view(fp8.DTYPE), factor, rows)
        return expanded.finish(y, z, lorc_B, bias, x.dtype)


operator = operators.register("portable_linear", _work)
