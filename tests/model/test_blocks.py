"""The decoder's blocks and their linears, found by structure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, LAYERS, Maker, configuration, write_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from zqfp_convert.errors import SourceError
from zqfp_convert.model import blocks, skeleton

PATHS = {
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "falcon": "transformer.h",
    "bloom": "transformer.h",
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_finds_the_decoder(arch: str, tiny_model: Maker) -> None:
    model = skeleton.build(tiny_model(arch))
    found = blocks.find_blocks(model)
    assert found.path == PATHS.get(arch, "model.layers")
    assert len(found.modules) == LAYERS
    for index, module in enumerate(found.modules):
        assert model.get_submodule(found.name(index)) is module
    inside = {id(linear) for block in found.modules for _, linear in blocks.linears(block)}
    outside = {name for name, linear in blocks.linears(model) if id(linear) not in inside}
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    assert outside == {head}
    assert found.decoder is model.get_decoder() or found.decoder is model.base_model


def test_conv1d_is_transposed() -> None:
    convolution, linear = Conv1D(6, 4), nn.Linear(4, 6)
    assert blocks.is_transposed(convolution)
    assert not blocks.is_transposed(linear)
    assert blocks.shape(convolution) == blocks.shape(linear) == (6, 4)
    x = torch.randn(3, 4)
    for module in (convolution, linear):
        want = x @ blocks.weight_matrix(module).T + module.bias
        torch.testing.assert_close(module(x), want)


def test_linears_of_gpt2(tiny_model: Maker) -> None:
    found = blocks.find_blocks(skeleton.build(tiny_model("gpt2")))
    shapes = {name: blocks.shape(linear) for name, linear in blocks.linears(found.modules[0])}
    assert shapes == {
        "attn.c_attn": (192, 64),
        "attn.c_proj": (64, 64),
        "mlp.c_fc": (256, 64),
        "mlp.c_proj": (64, 256),
    }


def test_first_tensor() -> None:
    x = torch.ones(2)
    assert blocks.first_tensor(x) is x
    assert blocks.first_tensor((x, None)) is x
    with pytest.raises(AssertionError):
        blocks.first_tensor(None)


def bare_model(decoder: nn.Module) -> transformers.PreTrainedModel:
    """A model around any decoder."""
    model = transformers.PreTrainedModel(configuration("llama"))
    model.body = decoder
    return model


@pytest.mark.parametrize(
    "decoder",
    [
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        nn.ModuleList(),
        nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)]),
        nn.ModuleList([nn.Linear(4, 4), nn.Bilinear(4, 4, 4)]),
    ],
    ids=["no list", "empty list", "no linears", "not alike"],
)
def test_no_recognisable_blocks(decoder: nn.Module) -> None:
    with pytest.raises(SourceError, match="no list of decoder blocks") as raised:
        blocks.find_blocks(bare_model(decoder))
    assert "PreTrainedModel" in raised.value.where


def test_a_single_block_is_enough(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", num_hidden_layers=1)
    assert len(blocks.find_blocks(skeleton.build(folder)).modules) == 1


@pytest.mark.parametrize(
    "config",
    [
        transformers.MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
        ),
        transformers.Qwen2MoeConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, num_experts=4, moe_intermediate_size=16,
            shared_expert_intermediate_size=16, mlp_only_layers=[0],
        ),
    ],
    ids=["mixtral", "qwen2_moe with a dense first block"],
)  # fmt: skip
def test_experts_are_refused(config: transformers.PretrainedConfig) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(SourceError, match="mixture of experts") as raised:
        blocks.find_blocks(model)
    assert "mlp" in raised.value.found
