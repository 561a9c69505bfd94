"""What models compute while they are measured is what they compute otherwise."""

from __future__ import annotations

import pytest
import torch
from architectures import configuration, random_model, token_ids
from transformers import StaticCache

from zqfp_convert.bench import attention


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma3", "gpt2", "bloom", "opt", "falcon"])
@torch.no_grad()
def test_same_logits(arch: str) -> None:
    """A prompt longer than the sliding windows there are, then single tokens."""
    model, ids = random_model(configuration(arch)), token_ids(1, 30)

    def logits() -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=40)
        parts = [model(ids[:, :24], past_key_values=cache, use_cache=True).logits]
        parts += [
            model(ids[:, n : n + 1], past_key_values=cache, use_cache=True).logits
            for n in range(24, 30)
        ]
        return torch.cat(parts, 1)

    want = logits()
    attention.simplify(model)
    torch.testing.assert_close(logits(), want)
