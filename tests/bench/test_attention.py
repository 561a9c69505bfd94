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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_token_in_half_precision(dtype: torch.dtype) -> None:
    """Within what rounding the scores costs, and scores beyond float16's range do no harm."""
    torch.manual_seed(0)
    query = (30 * torch.randn(1, 8, 1, 128)).to(dtype)
    key, value = (torch.randn(1, 2, 50, 128).to(dtype) for _ in range(2))
    key[..., 0, :] *= 100
    mask = torch.rand(1, 1, 1, 50) > 0.3
    module = torch.nn.Module()
    have, _ = attention.attend(module, query, key, value, mask)
    keys, values = (x.double().repeat_interleave(4, 1) for x in (key, value))
    scores = (query.double() @ keys.mT * 128**-0.5).masked_fill(~mask, -torch.inf)
    want = (scores.softmax(-1) @ values).transpose(1, 2)
    assert float((have.double() - want).norm() / want.norm()) < 0.03
