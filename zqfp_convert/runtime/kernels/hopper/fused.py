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
    """For x `[M, K]`, and the weights that it meets; the way is the fastest known."""
    tokens, columns = x.shape
    chunks, index = matrices[0].chunks, x.device.index or 0
    depth = chunks.data.shape[1]
    rows = tuple(matrix.y.shape[1] for matrix in matrices)
    steps = tuple(matrix.steps for matrix in matrices)
    if schedules.decodes(tokens, rows, columns, max(steps) * layout.RANKS, index):
        return room_to_decode(tokens, depth, sum(steps), x.device)
    schedule = schedules.choose(tokens, rows, columns, index).fit(chunks.groups)
    return room_to_multiply(tokens, rows, depth, sum(steps), schedule, x.device)


def room_to_decode(tokens: int, depth: int, steps: int, device: torch.device) -> Room:
    """For M tokens, `ceil(K / 128)`, and all steps of 8 ranks."""
    codes = torch.empty(decode.codes_shape(tokens, depth), dtype=torch.uint8, device=device)
    scale = torch.empty(decode.scales(tokens), dtype=torch.float32, device=device)
    return Room(Inputs(codes, scale, room_for_z(tokens, steps, device)), None, None)


def room_to_multiply(
    tokens: int,
    rows: tuple[int, ...],
    depth: int,
    steps: int,
    schedule: Schedule,
    device: torch.device,
) -> Room:
    """For M tokens, N of each weight, `ceil(K / 128)`, and all steps of 8 ranks."""
    codes = torch.empty(depth, tokens, layout.COLUMNS, dtype=torch.uint8, device=device)
    scale = torch.empty(tokens, dtype=torch.float32, device=device)
    count = flag_count(schedule, tokens, rows, depth, device.index or 0)
    flags = torch.empty(count, dtype=torch.int32, device=device)
    return Room(Inputs(codes, scale, room_for_z(tokens, steps, device)), flags, schedule)


def room_for_z(tokens: int, steps: int, device: torch.device) -> Tensor | None:
    """For z of M tokens and steps of 8 ranks, bfloat16 `[parts, steps, M, 16]`."""
    if not steps:
        return None
    shape = (inner_parts(tokens), steps, tokens, 2 * layout.RANKS)
    return torch.empty(shape, dtype=torch.bfloat16, device=device)
