"""The model on the meta device: its buffers, and how its modules get and lose weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Maker, configuration, token_ids, write_model
from dequantized import read_tensors
from torch import nn

from zqfp_convert.errors import SourceError
from zqfp_convert.model import skeleton
from zqfp_convert.model.names import NameMap


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_buffers_are_those_of_a_built_model(arch: str, tiny_model: Maker) -> None:
    model = skeleton.build(tiny_model(arch))
    built = transformers.AutoModelForCausalLM.from_config(configuration(arch), dtype=torch.float32)
    want = dict(built.named_buffers())
    assert dict(model.named_buffers()).keys() == want.keys()
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        assert buffer.dtype == want[name].dtype, name
        assert buffer.device.type == ("meta" if name in saved else "cpu"), name
        if name not in saved:
            assert torch.equal(buffer, want[name]), name
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not model.training


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_filled_it_is_the_model(arch: str, tiny_model: Maker) -> None:
    folder = tiny_model(arch)
    model, tensors = skeleton.build(folder), read_tensors(folder)
    names = NameMap(model, tensors)
    skeleton.assign(model, {place: tensors[name] for name, place in names.to_model.items()})
    model.tie_weights(missing_keys=set(names.unfilled), recompute_mapping=False)
    want = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(model(token_ids()).logits, want(token_ids()).logits)


def test_a_long_context_rope(tmp_path: Path) -> None:
    changes = {
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    }
    model = skeleton.build(write_model(tmp_path / "m", **changes))
    built = transformers.AutoModelForCausalLM.from_config(configuration("llama", **changes))
    for name, want in built.named_buffers():
        assert torch.equal(model.get_buffer(name), want), name


def test_dtype_is_that_of_the_configuration(tmp_path: Path) -> None:
    model = skeleton.build(write_model(tmp_path / "m", dtype=torch.bfloat16))
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_generation_config_is_read(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    assert skeleton.build(folder).generation_config.temperature == 0.25


def test_quantization_config_is_not_the_models(converted: Maker) -> None:
    assert not hasattr(skeleton.build(converted("llama", "fast")).config, "quantization_config")


@pytest.mark.parametrize("kind", ["vit", "t5"])
def test_a_model_of_another_kind(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(SourceError, match="decoder-only") as raised:
        skeleton.build(tmp_path)
    assert f"'{kind}'" in raised.value.found


@pytest.mark.parametrize("text", ['{"model_type": "no-such-model"}', "{}"])
def test_no_causal_language_model(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match="no model can be built") as raised:
        skeleton.build(tmp_path)
    assert raised.value.where == str(tmp_path / "config.json")


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, device="meta", dtype=torch.bfloat16)
        self.register_buffer("saved", torch.zeros(2, device="meta", dtype=torch.float16))
        self.register_buffer("count", torch.zeros((), device="meta", dtype=torch.int64))
        self.register_buffer("computed", torch.ones(2), persistent=False)


VALUES = {
    "linear.weight": torch.randn(2, 3),
    "linear.bias": torch.randn(2),
    "saved": torch.randn(2),
    "count": torch.tensor(7),
}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_assign(dtype: torch.dtype | None) -> None:
    part = Part()
    kept = part.computed
    skeleton.assign(part, VALUES, dtype)
    assert isinstance(part.linear.weight, nn.Parameter)
    assert not part.linear.weight.requires_grad
    assert part.linear.weight.dtype == (dtype or torch.bfloat16)
    assert torch.equal(part.linear.weight, VALUES["linear.weight"].to(dtype or torch.bfloat16))
    assert part.saved.dtype == (dtype or torch.float16)
    assert torch.equal(part.saved, VALUES["saved"].to(dtype or torch.float16))
    assert part.count.dtype == torch.int64
    assert int(part.count) == 7
    assert part.computed is kept
    assert part.state_dict().keys() == VALUES.keys()


def test_assign_and_empty_one_after_the_other() -> None:
    part = Part()
    for _ in range(2):
        skeleton.assign(part, VALUES)
        assert {tensor.device.type for tensor in part.state_dict().values()} == {"cpu"}
        skeleton.empty(part)
        assert {tensor.device.type for tensor in part.state_dict().values()} == {"meta"}
        assert part.computed.device.type == "cpu"
        assert torch.equal(part.computed, torch.ones(2))
        assert part.linear.weight.dtype == torch.bfloat16
