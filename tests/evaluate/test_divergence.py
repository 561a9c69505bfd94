"""Perplexity and KL against their definitions, token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zqfp_convert.evaluate.divergence import compare


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_against_the_definitions() -> None:
    original, converted = model(0), model(1)
    windows = torch.randint(40, (5, 9), generator=torch.Generator().manual_seed(2))
    loss = kl = same = 0.0
    for window in windows:
        p = original(window[None]).logits[0].double().softmax(-1)
        q = converted(window[None]).logits[0].double().softmax(-1)
        for place in range(8):
            loss -= math.log(q[place, window[place + 1]])
            kl += float((p[place] * (p[place] / q[place]).log()).sum())
            same += int(p[place].argmax() == q[place].argmax())
    measured = compare(original, converted, windows, batch=2)
    assert measured.tokens == 40
    assert measured.perplexity == pytest.approx(math.exp(loss / 40), rel=1e-4)
    assert measured.kl == pytest.approx(kl / 40, rel=1e-4)
    assert measured.same_top == pytest.approx(same / 40)


def test_a_model_with_itself() -> None:
    windows = torch.arange(20).view(2, 10)
    measured = compare(model(0), model(0), windows)
    assert measured.kl == pytest.approx(0.0, abs=1e-9)
    assert measured.same_top == 1.0
    assert measured.perplexity == measured.original_perplexity
