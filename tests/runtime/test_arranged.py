"""`from_pretrained` where there are kernels: weights in their order, on the way in and out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import Maker, token_ids
from dequantized import read_tensors
from transformers import AutoModelForCausalLM

import zqfp_convert
from zqfp_convert.runtime.linear import QuantizedLinear
from zqfp_convert.verify import verify

ARRANGED = {"hopper": "HopperWeights", "torch": "NoneType"}  # Triton's interpreter is too slow


@pytest.mark.parametrize("kernels", ARRANGED, indirect=True)
def test_there_and_back(kernels: str, converted: Maker, tmp_path: Path) -> None:
    folder = converted("llama", "best")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    layers = [one for one in model.modules() if isinstance(one, QuantizedLinear)]
    assert {type(layer.arranged).__name__ for layer in layers} == {ARRANGED[kernels]}
    ours = zqfp_convert.load(folder, device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        ids = token_ids(1, 3)
        assert torch.equal(model(ids).logits, ours(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    verify(tmp_path / "saved")
    before, after = read_tensors(folder), read_tensors(tmp_path / "saved")
    packed = [name for name in before if name.endswith(("packed", "scale", "codebook"))]
    assert packed
    assert all(torch.equal(before[name], after[name]) for name in packed)
    plain = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=zqfp_convert.ZqfpConfig(dequantize=True),
    )
    for layer in layers:
        assert torch.equal(plain.get_submodule(layer.name).weight, layer.weight)


@pytest.mark.parametrize("kernels", ["hopper"], indirect=True)
def test_gradients_do_not_part_siblings(kernels: str, converted: Maker) -> None:
    """Linears that share an input go on doing so while something before them is trained."""
    folder = converted("llama", "best")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = token_ids(1, 3)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient.isfinite().all()
    assert gradient[ids[0, :-1]].any(dim=-1).all()
    assert not model.model.layers[0].self_attn.q_proj._siblings.apart
