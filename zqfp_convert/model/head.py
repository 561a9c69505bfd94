"""From hidden states behind the last block to logits, some tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zqfp_convert.errors import SourceError
from zqfp_convert.model.blocks import Blocks, Returns, as_returned

TOKENS_TRIED = 64  # of a window, to see whether tokens can go by themselves
DIFFERENCE = 0.05  # relative; in bfloat16 other orders of additions give as much as 0.01


class Head:
    """All that follows the last block: the final norm, the output head, what it does to logits.

    The model itself is run, its blocks stubbed out to return given hidden states. Behind the
    blocks each token is by itself, so any tokens can go together, each as a window of its own.
    """

    def __init__(self, model: Callable[..., Any], blocks: Blocks, *, returns: Returns) -> None:
        """`model` is the model that has the blocks, or what calls it with the same arguments."""
        self._model, self._blocks, self._returns = model, blocks, returns

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[tokens, width]` behind the last block to logits `[tokens, vocabulary]`.

        In the dtype of the model, on its device, as is `hidden`.
        """
        ids = torch.zeros(len(hidden), 1, dtype=torch.int64, device=hidden.device)
        return self._behind(hidden[:, None], ids)[:, 0]

    def check(self, hidden: Tensor, ids: Tensor) -> None:
        """See whether each token is by itself: compare with a whole window.

        Args:
            hidden: any states `[1, tokens, width]`.
            ids: int64 `[1, tokens]`.

        Raises:
            SourceError: what follows the last block looks at more than its hidden states.
        """
        hidden, ids = hidden[:, :TOKENS_TRIED], ids[:, :TOKENS_TRIED]
        try:
            whole, alone = self._behind(hidden, ids)[0].float(), self.logits(hidden[0]).float()
            same = bool((alone - whole).norm() <= DIFFERENCE * whole.norm())
        except (IndexError, ValueError, RuntimeError):  # of the model's own lines
            same = False
        if not same:
            raise SourceError(
                type(self._blocks.decoder).__name__,
                "an output head that looks at more than the hidden states of its token",
                needed="logits that follow from what the last block returns, token by token",
                do="Convert with --tune 0: such a model cannot be tuned as a whole.",
            )

    def _behind(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The logits `[batch, tokens, vocabulary]` of hidden states `[batch, tokens, width]`."""
        for module in self._blocks.modules:
            returned = as_returned(hidden, module, self._returns)
            module.forward = lambda *args, returned=returned, **kwargs: returned
        try:
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        finally:
            for module in self._blocks.modules:
                del module.forward
        return logits
