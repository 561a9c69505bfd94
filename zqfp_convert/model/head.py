"""What follows a decoder's last block, run alone on slices of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zqfp_convert.model.blocks import Blocks


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
