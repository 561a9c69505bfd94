"""A flag for each group of weights: those of eight rows in a byte, the first in the lowest bit."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 8  # of a byte


def pack(flags: Tensor) -> Tensor:
    """Bool `[N, G]` to bytes uint8 `[ceil(N / 8), G]`; unused bits are 0."""
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, 0, 0, -flags.shape[0] % ROWS))
    place = torch.arange(ROWS, device=flags.device, dtype=torch.uint8)[:, None]
    return (padded.view(-1, ROWS, flags.shape[1]) << place).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, rows: int) -> Tensor:
    """Bytes uint8 `[ceil(N / 8), G]` to bool `[N, G]`, with `rows` = N."""
    place = torch.arange(ROWS, device=packed.device, dtype=torch.uint8)[:, None]
    return ((packed[:, None] >> place) & 1).bool().flatten(0, 1)[:rows]
