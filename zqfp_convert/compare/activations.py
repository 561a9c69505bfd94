"""What quantization leaves of activations, SmoothQuant's division of channels included."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zqfp_convert.compare.formats import Format
from zqfp_convert.compare.placement import Placement, between, place


@dataclass(frozen=True)
class Range:
    """The least and the largest value of each channel in calibration, float32 `[K]` both."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, inputs: Tensor) -> Range:
        """Of activations `[..., K]`."""
        inputs = inputs.flatten(0, -2).float()
        return cls(inputs.amin(0), inputs.amax(0))

    def joined(self, other: Range) -> Range:
        """The range that holds both."""
        return Range(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))


def smoothing(seen: Range, weights: list[Tensor], alpha: float) -> Tensor:
    """What to divide each channel by, `max|x_k|^alpha / max|w_k|^(1 - alpha)`, float32 `[K]`.

    SmoothQuant (Xiao et al., arXiv:2211.10438), equation 4; the largest weight is over all
    linears (`[N, K]` each) that take the input. Channels without input or weights keep theirs.
    """
    largest = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    peak = torch.maximum(seen.high, -seen.low)
    factor = peak.pow(alpha) / largest.pow(1 - alpha)
    return torch.where((factor > 0) & factor.isfinite(), factor, 1.0)


@dataclass(frozen=True)
class ActivationQuantizer:
    """Divides channels, then quantizes: to a scale for each token, or to one found before.

    Attributes:
        format: None to leave the numbers as they are.
        divisor: float32 `[K]`, or None.
        fixed: the one grid `[1, 1]` of static quantization, or None.
    """

    format: Format | None
    divisor: Tensor | None
    fixed: Placement | None

    @classmethod
    def make(
        cls, format: Format | None, divisor: Tensor | None, seen: Range | None
    ) -> ActivationQuantizer:
        """With `seen`, the range before the division, the grid is static."""
        fixed = None
        if format is not None and seen is not None:
            parts = (
                [seen.low, seen.high]
                if divisor is None
                else [seen.low / divisor, seen.high / divisor]
            )
            low, high = parts[0].min().clamp_max(0.0), parts[1].max().clamp_min(0.0)
            fixed = between(low.view(1, 1), high.view(1, 1), format, 1 << 62)
        return cls(format, divisor, fixed)

    def __call__(self, inputs: Tensor) -> Tensor:
        """What is left of activations `[..., K]`; shape and dtype are kept."""
        values = inputs.float()
        if self.divisor is not None:
            values = values / self.divisor
        if self.format is not None:
            matrix = values.reshape(-1, values.shape[-1])  # [tokens, K]
            grid = self.fixed or place(matrix, self.format, matrix.shape[1])
            values = grid.quantize(matrix).view(values.shape)
        return values.to(inputs.dtype)


class SimulatedLinear(nn.Module):
    """`y = W x^ + bias`, `x^` being what an `ActivationQuantizer` leaves of the input."""

    def __init__(self, weight: Tensor, bias: Tensor | None, quantizer: ActivationQuantizer) -> None:
        """`weight` is `[N, K]`, for inputs that the quantizer has divided; `bias` `[N]`."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self._quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        return nn.functional.linear(self._quantizer(x), self.weight, self.bias)  # type: ignore[arg-type]
