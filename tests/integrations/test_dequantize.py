"""The plain model of a packed checkpoint, at once or later."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import token_ids
from dequantized import manifest, read_tensors
from kinds import Packed
from mixtures import dense_weight, fused
from packed_layers import random_layer
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import zqfp_convert
from zqfp_convert.integrations.transformers import packing
from zqfp_convert.runtime.linear import QuantizedLinear, Scratch

PLAIN = zqfp_convert.ZqfpConfig(dequantize=True)


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "gemma3", "mixtral", "gpt_oss"])
def test_an_ordinary_model(kind: str, packed: Packed, source: Packed, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = AutoModelForCausalLM.from_pretrained(packed(kind), quantization_config=PLAIN)
    original = AutoModelForCausalLM.from_pretrained(source(kind))
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in original.named_modules()
    }
    assert not hasattr(model.config, "quantization_config")
    assert not model.is_quantized
    model.save_pretrained(tmp_path / "plain")
    saved, before = read_tensors(tmp_path / "plain"), read_tensors(source(kind))
    assert saved.keys() == before.keys()

    tensors, layers = read_tensors(packed(kind)), manifest(packed(kind))["layers"]
    want = {
        f"{name}.weight": dense_weight(packed(kind), tensors, name, entry["shape"][1])
        for name, entry in layers.items()
    }
    if not want.keys() <= before.keys():
        want |= fused(want | tensors, before)
    want = {name: tensor for name, tensor in (tensors | want).items() if name in saved}
    assert want.keys() == saved.keys()
    for name, tensor in want.items():
        have = saved[name].t() if saved[name].shape != tensor.shape else saved[name]
        if f"{name.removesuffix('.weight')}" in layers and kind == "gpt2":
            have = saved[name].t()  # stored [K, N]
        assert torch.allclose(have, tensor, rtol=1e-6, atol=1e-7), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_oss"])
def test_later(kind: str, packed: Packed, tmp_path: Path) -> None:
    at_once = AutoModelForCausalLM.from_pretrained(packed(kind), quantization_config=PLAIN)
    later = AutoModelForCausalLM.from_pretrained(packed(kind))
    later.save_pretrained(tmp_path / "packed")
    later.dequantize()
    have, want = later.state_dict(), at_once.state_dict()
    assert have.keys() == want.keys()
    assert all(torch.equal(have[name], want[name]) for name in want)
    later.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "zqfp_manifest.json").exists()


def test_added_biases_are_kept_and_warned_of(packed: Packed) -> None:
    with pytest.warns(UserWarning, match="biases that this architecture lacks"):
        model = AutoModelForCausalLM.from_pretrained(packed("added"), quantization_config=PLAIN)
    whole = AutoModelForCausalLM.from_pretrained(packed("added"))
    with torch.no_grad():
        have, want = model(token_ids()).logits, whole(token_ids()).logits
    assert (have - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_go_into_the_bias(transposed: bool) -> None:
    layer = random_layer("m2", 40, 72, 32, rank=3, span=3)
    layer = replace(layer, input_offset=torch.randn(72).bfloat16())
    bias = torch.randn(40)
    module = QuantizedLinear(layer, bias, Scratch())
    plain = packing._plain(module, torch.float64, transposed)
    assert type(plain) is (Conv1D if transposed else nn.Linear)
    x = torch.randn(5, 72).double()
    want = (x - layer.input_offset.double()) @ layer.approximation().double().T + bias.double()
    assert torch.allclose(plain(x), want, rtol=0, atol=1e-4)  # of outputs about 30, in float32
