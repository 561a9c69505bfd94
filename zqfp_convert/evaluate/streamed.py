"""Runs a model block by block, up to its hidden states; and its head, on slices of tokens.

At most one block has its weights at a time. Hidden states wait in host memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from zqfp_convert.calibration.stream import Entrance
from zqfp_convert.evaluate.divergence import PerToken, per_token
from zqfp_convert.evaluate.parts import Parts
from zqfp_convert.model.blocks import find_blocks
from zqfp_convert.model.head import Head


@dataclass(frozen=True)
class Streamed:
    """A model that has run.

    Attributes:
        hidden: behind the last block, for each batch, `[batch, tokens, width]` on the CPU.
        head: what makes logits of them.
    """

    hidden: list[Tensor]
    head: Head


def stream(parts: Parts, batches: list[Tensor], step: Callable[[int], None]) -> Streamed:
    """Run batches of token ids, int64 `[batch, tokens]` on the device, through a model's blocks.

    `step` is called with a block's index after each batch that went through it. The weights of no
    block stay; those outside the blocks do.
    """
    model, names = parts.model, parts.names
    blocks = find_blocks(model)
    parts.fill(model, "", names.outside(blocks.path))
    model.tie_weights(missing_keys=set(names.unfilled), recompute_mapping=False)
    entrance = Entrance(blocks, batches)
    hidden = [entrance.enter(batch).cpu() for batch in range(len(batches))]
    for index, empty in enumerate(blocks.modules):
        block = copy.deepcopy(empty)
        parts.fill(block, blocks.name(index) + ".", names.within(blocks.name(index)))
        entrance.try_block(index, block)
        calls = entrance.calls(index)
        for batch, ids in enumerate(batches):
            entering = hidden[batch].to(ids.device)
            hidden[batch] = calls(batch).run(block, entering).cpu()
            step(index)
    return Streamed(hidden, Head(model, blocks, returns=entrance.returns))


def compared(
    heads: tuple[Head, Head], hidden: tuple[Tensor, Tensor], ids: Tensor, size: int
) -> PerToken:
    """Every predicted token of a batch, `[batch, window - 1]` on the CPU.

    Args:
        heads: of the original and of the converted model.
        hidden: behind the last block of each, `[batch, window, width]` on the CPU.
        ids: the tokens, int64 `[batch, window]`, on the device to compare on.
        size: tokens whose logits are there at a time.
    """
    following = ids[:, 1:].flatten()  # [batch (window - 1)]
    states = [part[:, :-1].flatten(0, 1) for part in hidden]
    found = []
    for start in range(0, len(following), size):
        chosen = slice(start, start + size)
        want, have = (
            head.logits(part[chosen].to(ids.device))
            for head, part in zip(heads, states, strict=True)
        )
        found.append(per_token(want, have, following[chosen]))
    return PerToken.joined(found).view(ids.shape[0], -1)
