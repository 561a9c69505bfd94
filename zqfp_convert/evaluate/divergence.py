"""Perplexity, and the KL divergence to the original model, on windows of tokens."""

from __future__ import annotations

import math
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


@torch.inference_mode()
def compare(
    original: PreTrainedModel, converted: PreTrainedModel, windows: Tensor, batch: int = 4
) -> Divergence:
    """Compare two models on token ids, int64 `[samples, seq_len]`.

    Windows do not overlap and see nothing of each other; the first token of each is not predicted.
    """
    loss = original_loss = kl = same = 0.0
    for start in range(0, len(windows), batch):
        ids = windows[start : start + batch].to(original.device)
        want = original(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        have = converted(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        following = ids[:, 1:, None]
        original_loss -= float(want.gather(-1, following).double().sum())
        loss -= float(have.gather(-1, following).double().sum())
        kl += float((want.exp() * (want - have)).sum(-1).double().sum())
        same += float((want.argmax(-1) == have.argmax(-1)).double().sum())
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return Divergence(
        math.exp(loss / tokens),
        math.exp(original_loss / tokens),
        kl / tokens,
        same / tokens,
        tokens,
    )
