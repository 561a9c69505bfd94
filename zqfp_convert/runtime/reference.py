"""The reference path: plain torch on any device, the definition of right."""

from __future__ import annotations

import torch
from torch import Tensor

from zqfp_convert.numerics import fp8


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
