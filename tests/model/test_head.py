"""From hidden states to logits; models whose head looks at more are told apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, configuration, random_model, token_ids

from zqfp_convert.errors import SourceError
from zqfp_convert.model.blocks import find_blocks, others
from zqfp_convert.model.head import Head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokens_can_go_by_themselves(arch: str, dtype: torch.dtype) -> None:
    model = random_model(configuration(arch), dtype)
    blocks = find_blocks(model)
    seen: list[int | None] = []
    hook = blocks.modules[0].register_forward_hook(
        lambda module, args, output: seen.append(others(output))
    )
    with torch.no_grad():
        model(token_ids(1), use_cache=False)
        hook.remove()
        head = Head(model, blocks, returns={type(blocks.modules[0]): seen[0]})
        head.check(torch.randn(1, 24, 64).to(dtype), token_ids(1))


@pytest.mark.parametrize("looks_at", ["ids", "neighbours"])
def test_a_head_that_looks_at_more_is_refused(looks_at: str) -> None:
    model = random_model(configuration("llama"))

    def curious(input_ids: torch.Tensor, **given: Any) -> Any:
        logits = model(input_ids=input_ids, **given).logits
        if looks_at == "ids":
            return SimpleNamespace(
                logits=logits + model.get_input_embeddings()(input_ids).sum(-1)[..., None]
            )
        return SimpleNamespace(logits=logits.cumsum(1))

    head = Head(curious, find_blocks(model), returns={})
    with torch.no_grad(), pytest.raises(SourceError, match="looks at more"):
        head.check(torch.randn(1, 24, 64), token_ids(1))
