"""The reference path: plain torch on any device, the definition of right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.numerics import codebook, fp8
from zqfp_convert.numerics.scales import Kind
from zqfp_convert.runtime import operators


def linear(
    x: Tensor,
    weight: Tensor,
    lorc: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    input_offset: Tensor | None,
) -> Tensor:
    """`y = W^ x^ + B (s (A x^)) + bias` in float32, `x^` being the FP8-quantized activation.

    Args:
        x: `[..., K]`, any floating dtype.
        weight: float32 `[N, K]`, dequantized.
        lorc: float32 `A [r, K]` with its scales multiplied in, and `B [N, r]`.
        bias: `[N]`.
        input_offset: `[K]`, subtracted from x before it is quantized.

    Returns:
        `[..., N]` in the dtype of x.
    """
    seen = x.float() if input_offset is None else x.float() - input_offset.float()
    codes, scale = fp8.quantize(seen)
    seen = fp8.decode(codes) * scale
    y = torch.nn.functional.linear(seen, weight)
    if lorc is not None:
        A, B = lorc
        y = y + torch.nn.functional.linear(torch.nn.functional.linear(seen, A), B)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def _work(
    x: Tensor,
    rows: int,
    packed: Tensor,
    scale: Tensor,
    kind: str,
    group_size: int,
    row_scale: Tensor | None,
    bias: Tensor | None,
    input_offset: Tensor | None,
    lorc_A: Tensor | None,
    lorc_B: Tensor | None,
    lorc_scale: Tensor | None,
    magnitudes: Sequence[float],
    choice: Tensor | None,
) -> Tensor:
    """The reference path from the tensors as they lie on disk, x `[M, K]`.

    `magnitudes` are those of one codebook after another.
    """
    scales: Kind = kind  # type: ignore[assignment]
    factors = lorc_A, lorc_B, lorc_scale
    about = scales, group_size, x.shape[1], packed, scale, row_scale, *factors, input_offset
    layer = PackedLayer("", *about, codebook.split(magnitudes), choice)
    return linear(x, layer.dequantize(), layer.lorc_factors(), bias, input_offset)


operator = operators.register("reference_linear", _work)
