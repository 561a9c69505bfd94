"""How many windows of calibration text go through a block at once: found, not guessed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from zqfp_convert.calibration.stream import Entrance
from zqfp_convert.conversion.block import fill, fill_outside
from zqfp_convert.conversion.host import taken_by
from zqfp_convert.model import skeleton
from zqfp_convert.model.blocks import linears, shape
from zqfp_convert.plan import TOKENS_AT_ONCE, Plan, batch_bytes


def windows_at_once(plan: Plan, windows: Tensor) -> int:
    """As many of the windows, int64 `[samples, seq_len]`, as is good for the device.

    On a GPU the largest power of two with which collecting statistics takes no more memory than
    something else does: one window is run through the first block, and what that takes is measured.
    """
    samples, length = windows.shape
    size = max(1, TOKENS_AT_ONCE[plan.device.type] // length)
    if plan.device.type == "cuda":
        fits = batch_bytes(plan) // max(1, _bytes_of_one(plan, windows[:1]))
        size = 1 << max(0, min(fits, size).bit_length() - 1)
    return min(samples, size)


@torch.no_grad()
def _bytes_of_one(plan: Plan, window: Tensor) -> int:
    """The memory that a window takes in the first block."""
    fill_outside(plan, head=False)
    entrance = Entrance(plan.blocks, [window.to(plan.device)])
    block = copy.deepcopy(plan.blocks.modules[0])
    fill(plan, block, plan.blocks.name(0) + ".", plan.block_tensors(0))
    hidden, call = entrance.first()[0], entrance.calls(0)(0)
    call.run(block, hidden)  # libraries allocate their workspaces
    peak = taken_by(lambda: call.run(block, hidden), plan.device)
    # While the original's block runs, the student's input of a linear waits, as it is quantized.
    widest = max(shape(linear)[1] for _, linear in linears(block))
    skeleton.empty(block)
    return peak + window.numel() * widest * hidden.element_size()
