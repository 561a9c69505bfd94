"""E2M1, the 4-bit floating-point format of the weights (OCP Microscaling Formats v1.0, 5.3.3).

A code is sign, 2 exponent bits, 1 mantissa bit; magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MAX = 6.0


def round_to_grid(values: Tensor) -> Tensor:
    """Round to the nearest E2M1 value, ties to the even mantissa, beyond 6 to 6.

    The spacing is 0.5 below 2, 1 below 4 and 2 above, and `torch.round` breaks its ties to the
    even multiple of the spacing, which is the even mantissa. NaN stays NaN, zeros keep their sign.
    dtype and shape are kept (a floating dtype).
    """
    magnitude = values.abs()
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    step = step.to(values.dtype)
    return (torch.round(values / step) * step).clamp(-MAX, MAX)
