"""How models attend while they are measured: torch's attention, without what compiling adds.

Compiled, transformers gives every prompt a mask of M x M, which keeps the flash kernel away, and
copies keys and values for each head that shares them. Neither is needed: a prompt meets an empty
cache, and one token's heads can be rows of one head. The results are the same but for rounding: one
token's scores are kept in the model's dtype before the softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

USUAL, OURS = "sdpa", "zqfp_bench_sdpa"


def simplify(model: PreTrainedModel) -> None:
    """Let a model attend so, if it would take torch's attention anyway."""
    if model.config._attn_implementation == USUAL:
        AttentionInterface.register(OURS, attend)
        AttentionMaskInterface.register(OURS, mask)
        model.set_attn_implementation(OURS)


def mask(**about: Any) -> Tensor | None:
    """Torch's, but None for a prompt, where `is_causal` does, unless attention is local."""
    tokens = about["q_length"] if "q_length" in about else len(about["cache_position"])
    if tokens > 1 and about.get("local_size") is None:
        return None
    masked: Tensor | None = sdpa_mask(**about)
    return masked


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **about: Any,
) -> tuple[Tensor, None]:
    """Attention of `[B, heads, M, D]` over `[B, shared heads, L, D]`; `[B, M, heads, D]`."""
    batch, heads, tokens, depth = query.shape
    shared = key.shape[1]
    one_mask = attention_mask is None or (
        attention_mask.shape[1] == 1 and attention_mask.dtype == torch.bool
    )
    plain = about.get("position_bias") is None and about.get("softcap") is None
    if tokens > 1 or heads == shared or not one_mask or not plain:
        usual: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **about
        )
        return usual
    # torch's kernels go through the cache with one multiprocessor for each shared head.
    packed = query.reshape(batch, shared, heads // shared, depth)
    # Scaled first, so that nothing leaves float16's range.
    scaled = packed * (about.get("scaling") or depth**-0.5)
    scores = (scaled @ key.transpose(2, 3)).float()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    y = scores.softmax(-1).to(value.dtype) @ value
    return y.reshape(batch, 1, heads, value.shape[-1]), None
