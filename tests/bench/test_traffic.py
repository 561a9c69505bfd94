"""Bytes of weights, and bytes read for a token."""

from __future__ import annotations

import torch
from architectures import Maker, configuration, random_model
from transformers import StaticCache

import zqfp_convert
from zqfp_convert.bench import traffic
from zqfp_convert.checkpoint.reader import PackedCheckpoint


def test_weight_bytes_count_tied_ones_once() -> None:
    untied, tied = (
        random_model(configuration("llama", tie_word_embeddings=tie)) for tie in (False, True)
    )
    assert traffic.weight_bytes(untied) - traffic.weight_bytes(tied) == 384 * 64 * 4


def test_read_for_a_token(converted: Maker) -> None:
    folder = converted("llama", "best")
    checkpoint = PackedCheckpoint(folder)
    model = zqfp_convert.load(folder, "cpu", torch.bfloat16)
    cache = StaticCache(config=model.config, max_cache_len=48)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long), past_key_values=cache)
    read = traffic.read_for_a_token(model, cache)
    packed = sum(layer.nbytes for name in checkpoint.layers
                 for layer in checkpoint.layer(name).tensors().values())  # fmt: skip
    assert read[traffic.WEIGHTS] + read[traffic.ROWS] + read[traffic.LORC] == packed
    assert read[traffic.EMBEDDING] == 64 * 2
    assert read[traffic.HEAD] == 384 * 64 * 2
    assert read[traffic.CACHE] == 2 * 2 * 2 * 16 * 48 * 2  # layers, K and V, heads, depth, tokens
    assert set(read) == set(traffic.KINDS)


def test_read_bandwidth() -> None:
    assert traffic.read_bandwidth(torch.device("cpu")) > 1e8
