"""The mean of LayerNorm outputs goes into the next biases: exactly, or not at all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    QUICK,
    WITH_LAYER_NORMS,
    Maker,
    configuration,
    random_model,
    token_ids,
    write_model,
)
from dequantized import read_tensors
from torch import Tensor, nn

import zqfp_convert
from zqfp_convert.calibration.centering import Change, center_norms
from zqfp_convert.calibration.stream import Entrance, Stream
from zqfp_convert.model.blocks import find_blocks, linears

WITHOUT = [arch for arch in ARCHITECTURES if arch not in WITH_LAYER_NORMS]
NORMS = {  # of a block, with the linears that take their output
    "opt": {"self_attn_layer_norm": {"q_proj", "k_proj", "v_proj"}, "final_layer_norm": {"fc1"}},
    "gpt2": {"ln_1": {"c_attn"}, "ln_2": {"c_fc"}},
    "gpt_neox": {"input_layernorm": {"query_key_value"},
                 "post_attention_layernorm": {"dense_h_to_4h"}},
    "falcon": {"input_layernorm": {"query_key_value", "dense_h_to_4h"}},
    "bloom": {"input_layernorm": {"query_key_value"},
              "post_attention_layernorm": {"dense_h_to_4h"}},
    "stablelm": {"input_layernorm": {"q_proj", "k_proj", "v_proj"},
                 "post_attention_layernorm": {"gate_proj", "up_proj"}},
}  # fmt: skip


def folded(
    model: nn.Module, dtype: torch.dtype, leave: str | None = None
) -> tuple[list[Change], Stream]:
    """Fold the first block of a model in place; with the states that enter it."""
    blocks = find_blocks(model)
    block = blocks.modules[0]
    entrance = Entrance(blocks, [token_ids(2), token_ids(2, seed=7)])
    stream = Stream(entrance.first())
    quantized = {name for name, _ in linears(block) if leave is None or leave not in name}
    return center_norms(block, quantized, stream, entrance.calls(0), dtype), stream


def leaf(change: Change) -> str:
    return change.name.removesuffix(".bias").rpartition(".")[2]


@pytest.mark.parametrize("arch", WITH_LAYER_NORMS)
@torch.no_grad()
def test_the_same_function_in_float64(arch: str) -> None:
    model = random_model(configuration(arch), torch.float64)
    ids = token_ids(3, seed=5)  # others than the mean was taken from
    want, before = model(ids).logits, copy.deepcopy(find_blocks(model).modules[0])
    changes, _ = folded(model, torch.float64)
    assert {leaf(change) for change in changes} == {
        name for norm, users in NORMS[arch].items() for name in (norm, *users)
    }
    block = find_blocks(model).modules[0]
    for norm, _ in NORMS[arch].items():
        moved = block.get_submodule(norm).bias - before.get_submodule(norm).bias
        assert moved.abs().max() > 1e-3
    have = model(ids).logits
    assert want.dtype == torch.float64
    # Some models take their softmax in float32 whatever they are given.
    assert (have - want).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.parametrize("arch", WITH_LAYER_NORMS)
@torch.no_grad()
def test_outputs_of_the_norms_have_no_mean(arch: str) -> None:
    model = random_model(configuration(arch))
    _, stream = folded(model, torch.float32)
    block = find_blocks(model).modules[0]
    entrance = Entrance(find_blocks(model), [token_ids(2), token_ids(2, seed=7)])
    for norm in NORMS[arch]:
        outputs: list[Tensor] = []
        hook = block.get_submodule(norm).register_forward_hook(
            lambda m, a, out, outputs=outputs: outputs.append(out.flatten(0, -2))
        )
        for index, hidden in enumerate(stream.hidden):
            entrance.calls(0)(index).run(block, hidden)
        hook.remove()
        assert torch.cat(outputs).mean(0).abs().max() < 1e-5


@pytest.mark.parametrize("arch", WITH_LAYER_NORMS)
@torch.no_grad()
def test_changes_say_what_they_are(arch: str) -> None:
    model = random_model(configuration(arch), torch.float32)
    before = {name for name, _ in find_blocks(model).modules[0].named_parameters()}
    changes, _ = folded(model, torch.bfloat16)
    for change in changes:
        if leaf(change) in NORMS[arch]:
            assert change.kind == "norm_changed"
            assert change.value.dtype == torch.bfloat16
        else:
            assert change.kind == ("bias_changed" if change.name in before else "bias_added")
            assert change.value.dtype == torch.float32


@pytest.mark.parametrize("arch", WITHOUT)
@torch.no_grad()
def test_other_norms_are_left_alone(arch: str, converted: Maker, tiny_model: Maker) -> None:
    model = random_model(configuration(arch))
    before = copy.deepcopy(find_blocks(model).modules[0]).state_dict()
    assert folded(model, torch.float32)[0] == []
    after = find_blocks(model).modules[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before.keys() == after.keys()
    source, packed = read_tensors(tiny_model(arch)), read_tensors(converted(arch, "best"))
    biases = {name for name in source if name.endswith(".bias")}
    assert biases == {name for name in packed if name.endswith(".bias")}
    assert all(torch.equal(source[name], packed[name]) for name in biases)


@pytest.mark.parametrize(
    ("arch", "leave", "refused"),
    [
        ("opt", "v_proj", {"self_attn_layer_norm"}),  # a constant on all keys would do no harm
        ("opt", "fc1", {"final_layer_norm"}),
        ("stablelm", "up_proj", {"post_attention_layernorm"}),
        ("falcon", "query_key_value", {"input_layernorm"}),
        ("gpt2", "c_", {"ln_1", "ln_2"}),
    ],
)
@torch.no_grad()
def test_refused_where_a_consumer_is_not_quantized(
    arch: str, leave: str, refused: set[str]
) -> None:
    model = random_model(configuration(arch))
    before = copy.deepcopy(find_blocks(model).modules[0])
    changes, _ = folded(model, torch.float32, leave)
    assert {leaf(change) for change in changes} == {
        name
        for norm, users in NORMS[arch].items()
        if norm not in refused
        for name in (norm, *users)
    }
    block = find_blocks(model).modules[0]
    for norm in refused:
        assert torch.equal(block.get_submodule(norm).bias, before.get_submodule(norm).bias)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
        ("opt", {"do_layer_norm_before": False}),
    ],
)
@torch.no_grad()
def test_refused_where_the_norm_feeds_the_residual(arch: str, changes: dict[str, Any]) -> None:
    model = random_model(configuration(arch, **changes))
    want = model(token_ids()).logits
    assert folded(model, torch.float32)[0] == []
    assert torch.equal(model(token_ids()).logits, want)


@torch.no_grad()
def test_a_model_that_cannot_run_in_float64_is_left_alone() -> None:
    """XGLM fills its masks with the least number of a dtype, as a float32: float64 overflows."""
    import transformers

    config = transformers.XGLMConfig(
        vocab_size=384, d_model=64, ffn_dim=96, num_layers=2, attention_heads=4
    )
    model = random_model(config)
    want = model(token_ids()).logits
    changes, _ = folded(model, torch.float32)
    torch.testing.assert_close(model(token_ids()).logits, want, rtol=1e-4, atol=1e-4)
    assert isinstance(changes, list)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_as_written(dtype: torch.dtype, tmp_path: Path) -> None:
    """What a norm's bias loses in the file, its consumers' biases gain: nothing is rounded away."""
    source = write_model(tmp_path / "source", "opt", dtype)
    zqfp_convert.convert(source, tmp_path / "out", recipe="best", **QUICK)
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    model = zqfp_convert.load(tmp_path / "out", device="cpu").state_dict()
    for layer in range(2):
        prefix = f"model.decoder.layers.{layer}."
        for norm, users in {
            "self_attn_layer_norm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "final_layer_norm": ["fc1"],
        }.items():
            name = f"{prefix}{norm}.bias"
            assert after[name].dtype == dtype
            taken = before[name].double() - model[name].double()
            assert taken.abs().max() > 1e-3
            for user in users:
                gained = (
                    after[f"{prefix}{user}.bias"].double() - before[f"{prefix}{user}.bias"].double()
                )
                want = before[f"{prefix}{user}.weight"].double() @ taken
                assert (gained - want).abs().max() < 1e-6 * want.abs().max()


def test_ignored_consumers_stay_as_they_are(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "opt")
    result = zqfp_convert.convert(
        source, tmp_path / "out", recipe="best", ignore=("v_proj", "lm_head"), **QUICK
    )
    changed = {name.rpartition("layers.")[2][2:] for name in result.changed}
    assert changed == {"final_layer_norm.bias", "fc1.bias"}
