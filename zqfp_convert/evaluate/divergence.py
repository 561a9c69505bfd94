"""Log-losses of two models, and the KL divergence between them, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Divergence:
    """What a comparison measured, over all predicted tokens.

    Attributes:
        perplexity: of the converted model; original_perplexity: of the original.
        kl: mean KL(original || converted) of the next-token distributions, in nats.
        same_top: share of the tokens at which both find the same token likeliest.
        tokens: how many were predicted.
    """

    perplexity: float
    original_perplexity: float
    kl: float
    same_top: float
    tokens: int


@dataclass(frozen=True)
class PerToken:
    """What two models make of each predicted token; tensors of one shape.

    Attributes:
        loss: -log of the converted model's probability of the token, nats, float32.
        original_loss: of the original's.
        kl: KL(original || converted) of the two distributions, nats, float32.
        same: whether both find the same token likeliest, bool.
    """

    loss: Tensor
    original_loss: Tensor
    kl: Tensor
    same: Tensor

    @classmethod
    def joined(cls, parts: Sequence[PerToken]) -> PerToken:
        """All parts, one after the other along the first dimension."""
        return cls(*(torch.cat(each) for each in zip(*map(PerToken._tensors, parts), strict=True)))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.loss, self.original_loss, self.kl, self.same

    def rows(self, chosen: slice) -> PerToken:
        """Some along the first dimension."""
        return PerToken(*(tensor[chosen] for tensor in self._tensors()))

    def view(self, *extents: int) -> PerToken:
        """In another shape, on the CPU."""
        return PerToken(*(tensor.cpu().view(extents) for tensor in self._tensors()))

    @property
    def finite(self) -> bool:
        """Whether neither losses nor KL hold NaN or infinity."""
        return bool(self.kl.isfinite().all() and self.loss.isfinite().all())


def per_token(original: Tensor, converted: Tensor, following: Tensor) -> PerToken:
    """Compare logits `[..., vocabulary]` of two models, where `following` `[...]`, int64, came.

    `KL = sum_v p_v (log p_v - log q_v)`, p being the original's distribution; softmax in float32.
    """
    want = original.float().log_softmax(-1)
    have = converted.float().log_softmax(-1)
    index = following[..., None]
    return PerToken(
        -have.gather(-1, index)[..., 0],
        -want.gather(-1, index)[..., 0],
        (want.exp() * (want - have)).sum(-1),
        want.argmax(-1) == have.argmax(-1),
    )


@torch.inference_mode()
def compare(
    original: PreTrainedModel, converted: PreTrainedModel, windows: Tensor, batch: int = 4
) -> Divergence:
    """Compare two whole models on token ids, int64 `[samples, seq_len]`.

    Windows do not overlap and see nothing of each other; the first token of each is not predicted.
    """
    loss = original_loss = kl = same = 0.0
    for start in range(0, len(windows), batch):
        ids = windows[start : start + batch].to(original.device)
        want = original(ids, use_cache=False).logits[:, :-1]
        have = converted(ids, use_cache=False).logits[:, :-1]
        found = per_token(want, have, ids[:, 1:])
        original_loss += float(found.original_loss.double().sum())
        loss += float(found.loss.double().sum())
        kl += float(found.kl.double().sum())
        same += float(found.same.double().sum())
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return Divergence(
        math.exp(loss / tokens),
        math.exp(original_loss / tokens),
        kl / tokens,
        same / tokens,
        tokens,
    )
