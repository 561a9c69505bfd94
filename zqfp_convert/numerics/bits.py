"""Eight flags in a byte, the first in the lowest bit."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(flags: Tensor) -> Tensor:
    """Bool `[N, G]` to bytes uint8 `[N, ceil(G / 8)]`; unused bits are 0."""
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -flags.shape[1] % 8))
    place = torch.arange(8, device=flags.device, dtype=torch.uint8)
    return (padded.view(len(flags), -1, 8) << place).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, count: int) -> Tensor:
    """Bytes uint8 `[N, ceil(G / 8)]` to bool `[N, G]`, with `count` = G."""
    place = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> place) & 1).bool().flatten(-2)[..., :count]
