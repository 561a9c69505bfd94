"""Runs a model block by block, up to its hidden states; and its head, on slices of tokens.

At most one block has its weights at a time. Hidden states wait in host memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zqfp_convert.calibration.stream import Entrance
from zqfp_convert.evaluate.divergence import PerToken, per_token
from zqfp_convert.evaluate.parts import Parts
from zqfp_convert.model.blocks import Blocks, find_blocks


class Head:
    """All that follows the last block: the final norm, the output head, what it does to logits.

    The model itself is run, its blocks stubbed out to return given hidden states. Behind the
    blocks each token is by itself, so any tokens can go together, each as a window of its own.
    """

    def __init__(self, model: PreTrainedModel, blocks: Blocks, *, returns_tuple: bool) -> None:
        self._model, self._blocks, self._returns_tuple = model, blocks, returns_tuple

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[tokens, width]` behind the last block to logits `[tokens, vocabulary]`.

        In the dtype of the model, on its device, as is `hidden`.
        """
        state = hidden[:, None]  # [tokens, 1, width]
        returned = (state,) if self._returns_tuple else state
        ids = torch.zeros(len(hidden), 1, dtype=torch.int64, device=hidden.device)
        for module in self._blocks.modules:
            module.forward = lambda *args, **kwargs: returned
        try:
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        finally:
            for module in self._blocks.modules:
                del module.forward
        return logits[:, 0]


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
        if index == 0:
            entrance.try_first(block)
        calls = entrance.calls(index)
        for batch, ids in enumerate(batches):
            entering = hidden[batch].to(ids.device)
            hidden[batch] = calls(batch).run(block, entering).cpu()
            step(index)
    return Streamed(hidden, Head(model, blocks, returns_tuple=entrance.returns_tuple))


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
