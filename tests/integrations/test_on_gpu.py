"""Packed models in transformers and peft on real GPUs with FP8."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import token_ids
from dequantized import read_tensors
from kinds import Packed
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import zqfp_convert
from zqfp_convert.runtime import expanded
from zqfp_convert.runtime.linear import QuantizedLinear

CUDA = torch.device("cuda", 0)

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and expanded.available(CUDA)), reason="needs a GPU with FP8"
)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(token_ids().to(CUDA)).logits.to(CUDA)


@pytest.mark.parametrize("kind", ["llama", "opt", "mixtral"])
def test_the_same_as_load_and_saved_again(kind: str, packed: Packed, tmp_path: Path) -> None:
    ours = zqfp_convert.load(packed(kind), device=CUDA, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        packed(kind), device_map={"": 0}, dtype=torch.bfloat16
    )
    kernels = {one._kernels for one in ours.modules() if isinstance(one, QuantizedLinear)}
    assert {m._kernels for m in model.modules() if isinstance(m, QuantizedLinear)} == kernels
    assert "none" not in kernels
    assert torch.equal(logits(model), logits(ours))
    model.save_pretrained(tmp_path)
    before, after = read_tensors(packed(kind)), read_tensors(tmp_path)
    packed_names = [name for name in before if name.endswith(".weight_packed")]
    assert all(torch.equal(before[name], after[name]) for name in packed_names)


def test_moved_after_it_was_loaded(packed: Packed) -> None:
    ours = zqfp_convert.load(packed("llama"), device=CUDA, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(packed("llama"), dtype=torch.bfloat16)
    assert torch.equal(logits(model.to(CUDA)), logits(ours))


def test_a_lora_step(packed: Packed) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(
        packed("llama"), device_map={"": 0}, dtype=torch.bfloat16
    )
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    adapted = peft.get_peft_model(model, settings)
    chosen = [one for one in adapted.parameters() if one.requires_grad]
    optimizer, ids = torch.optim.AdamW(chosen, lr=1e-2), token_ids().to(CUDA)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two(packed: Packed) -> None:
    ours = zqfp_convert.load(packed("llama"), device=CUDA, dtype=torch.bfloat16)
    first = ["model.embed_tokens", "model.rotary_emb", "model.layers.0"]
    second = ["model.layers.1", "model.norm", "lm_head"]
    model = AutoModelForCausalLM.from_pretrained(
        packed("llama"),
        device_map=dict.fromkeys(first, 0) | dict.fromkeys(second, 1),
        dtype=torch.bfloat16,
    )
    assert torch.equal(logits(model), logits(ours))
