"""Two 4-bit codes in a byte: even columns in the low nibble, odd columns in the high one."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor) -> Tensor:
    """Codes uint8 `[N, K]` (0 to 15) to bytes uint8 `[N, ceil(K / 2)]`; a last odd nibble is 0."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """Bytes uint8 `[N, ceil(K / 2)]` to codes uint8 `[N, K]`, with `columns` = K."""
    pairs = torch.stack((packed & 0x0F, packed >> 4), dim=-1)  # [N, ceil(K / 2), 2]
    return pairs.flatten(-2)[..., :columns]
