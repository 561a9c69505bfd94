"""What a quantized linear will do, on any device: dense weights, quantized activations.

Where FP8 tensor cores can do just that, `runtime.resident` stands in for quantized linears instead.
"""

from __future__ import annotations

from torch import Tensor, nn

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.numerics import fp8


class SimulatedLinear(nn.Module):
    """`y = W x^ + bias` with `x^` the activation after E4M3 quantization for each token.

    It stands in for a quantized linear while the blocks behind it are calibrated.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` is `[N, K]`, dequantized, low-rank compensation included; `bias` `[N]`."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        return nn.functional.linear(fp8.simulate(x), self.weight, self.bias)  # type: ignore[arg-type]


class SimulatedExpertLinear(nn.Module):
    """The same for a linear of an expert: dequantized as it is used, for a block has many."""

    def __init__(self, layer: PackedLayer, bias: Tensor | None) -> None:
        """`layer` lies on the device; `bias` is `[N]`."""
        super().__init__()
        self._layer = layer
        self.bias: Tensor | None
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self._layer.approximation().to(x.dtype)
        return nn.functional.linear(fp8.simulate(x), weight, bias)
