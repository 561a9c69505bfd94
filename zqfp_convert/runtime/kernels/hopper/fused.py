"""A fused product from its activations to its results: which kernel, and room for what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zqfp_convert.runtime.kernels.hopper import decode, layout, schedules
from zqfp_convert.runtime.kernels.hopper.multiply import (
    Inputs,
    Matrix,
    Schedule,
    flag_count,
    inner_parts,
    multiply,
)
from zqfp_convert.runtime.kernels.hopper.quantize import quantize

DECODED = 4  # tokens, up to which `decode` is faster: whatever runs between two products hides a
# part of its reading


@dataclass(frozen=True)
class Room:
    """What the activations of a product become.

    Attributes:
        inputs: of the product; `fill` writes them.
        flags: of `multiply`; None for `decode`.
        schedule: the same.
    """

    inputs: Inputs
    flags: Tensor | None
    schedule: Schedule | None

    def fill(self, x: Tensor, input_offset: Tensor | None, factors: Factors) -> None:
        """Quantize x `[M, K]`, and make z."""
        to = self.inputs
        quantize(x, input_offset, *factors, to.codes, to.token_scale, to.inner, self.flags)

    def multiply(self, matrices: Sequence[Matrix]) -> None:
        """Write `y` of each."""
        if self.schedule is None:
            decode.decode(self.inputs, matrices)
        else:
            assert self.flags is not None
            multiply(self.inputs, matrices, self.schedule, self.flags)


Factors = tuple[Sequence[Tensor], Sequence[Tensor]]  # A and s of each weight


def room(x: Tensor, matrices: Sequence[Matrix]) -> Room:
    """For x `[M, K]`, and the weights that it meets."""
    tokens, columns = x.shape
    chunks, index = matrices[0].chunks, x.device.index or 0
    depth = chunks.data.shape[1]
    rows = tuple(matrix.y.shape[1] for matrix in matrices)
    steps = tuple(matrix.steps for matrix in matrices)
    z = room_for_z(tokens, sum(steps), x.device)
    if tokens <= DECODED and decode.fits(tokens, rows, depth, steps, index):
        codes = x.new_empty(decode.codes_shape(tokens, depth), dtype=torch.uint8)
        scale = x.new_empty(decode.scales(tokens), dtype=torch.float32)
        return Room(Inputs(codes, scale, z), None, None)
    schedule = schedules.choose(tokens, rows, columns, index).fit(chunks.groups)
    codes = x.new_empty(depth, tokens, layout.COLUMNS, dtype=torch.uint8)
    scale = x.new_empty(tokens, dtype=torch.float32)
    flags = x.new_empty(flag_count(schedule, tokens, rows, depth, index), dtype=torch.int32)
    return Room(Inputs(codes, scale, z), flags, schedule)


def room_for_z(tokens: int, steps: int, device: torch.device) -> Tensor | None:
    """For z of M tokens and steps of 8 ranks, bfloat16 `[parts, steps, M, 16]`."""
    if not steps:
        return None
    shape = (inner_parts(tokens), steps, tokens, 2 * layout.RANKS)
    return torch.empty(shape, dtype=torch.bfloat16, device=device)
