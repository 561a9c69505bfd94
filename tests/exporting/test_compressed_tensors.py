"""Exports to compressed-tensors, loaded by transformers with that package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from architectures import token_ids
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from dequantized import CODES, manifest, read_tensors
from exported_models import Packer, dequantized, logits, plain, relative, weights
from huggingface_hub import metadata_load
from test_verify import rewrite

import zqfp_convert
from zqfp_convert.errors import SourceError
from zqfp_convert.exporting.compressed_tensors import quantization_config
from zqfp_convert.exporting.spans import wide


def loaded(folder: Path, dtype: torch.dtype = torch.bfloat16) -> hf.PreTrainedModel:
    """The exported model with the weights decompressed, activations as they are."""
    option = hf.CompressedTensorsConfig(dequantize=True)
    if not getattr(option, "dequantize", False):
        pytest.skip("this transformers quantizes activations, whatever is asked of it")
    return plain(folder, quantization_config=option, dtype=dtype)


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("qwen2", {}),
        ("qwen2", {"group_size": 64}),  # 160 columns: 64, 64 and 32
        ("qwen2", {"group_size": "row"}),
        ("opt", {"recipe": "best", "rank": 0}),  # means of norms went into biases
        ("mixtral", {"config": {"intermediate_size": 64}}),
    ],
)
def test_logits_are_those_of_the_dequantized_model(
    packed: Packer, tmp_path: Path, arch: str, options: dict[str, Any]
) -> None:
    checkpoint = packed(arch, **options)
    made = zqfp_convert.export(checkpoint, tmp_path / "ct")
    assert made.layers == len(manifest(checkpoint)["layers"])
    assert made.adapter is None
    card = tmp_path / "ct" / "README.md"
    assert {"compressed-tensors", "mxfp4"} <= set(metadata_load(card)["tags"])
    assert "lora" not in card.read_text().lower()
    have = loaded(tmp_path / "ct")
    if arch == "mixtral":  # its experts are fused as they are loaded
        zqfp_convert.export(checkpoint, tmp_path / "bf16", "bf16")
        want = plain(tmp_path / "bf16")
    else:
        want = dequantized(checkpoint)
        for name, weight in weights(checkpoint, merged=False).items():
            assert torch.equal(have.get_submodule(name).weight.double(), weight), name
    assert torch.equal(logits(have, token_ids()), logits(want, token_ids()))


def test_activations_are_quantized_by_default(packed: Packer, tmp_path: Path) -> None:
    checkpoint = packed("demo")
    zqfp_convert.export(checkpoint, tmp_path / "ct")
    model = plain(tmp_path / "ct")
    have, want = (logits(m, token_ids()) for m in (model, dequantized(checkpoint)))
    # compressed-tensors rounds scales and quotients in bfloat16: not the FP8 bytes of ours
    assert 0.01 < relative(have - want, want) < 0.1
    for name, weight in weights(checkpoint, merged=False).items():  # decompressed as it ran
        assert torch.equal(model.get_submodule(name).weight.double(), weight), name


def test_every_byte_means_the_same(tmp_path: Path) -> None:
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    codes = torch.arange(32, dtype=torch.uint8).expand(255, 32) % 16
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    scheme = QuantizationScheme(**quantization_config(set())["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    state = {"weight_packed": packed, "weight_scale": scales}
    have = compressor.decompress(state, scheme)["weight"].double()
    want = CODES[codes.long()] * 2.0 ** (scales.double() - 127)
    finite = want.abs() <= torch.finfo(torch.bfloat16).max  # beyond, no writer goes
    assert bool((have == want)[finite].all())


def test_compensation_is_a_lora_of_peft(packed: Packer, tmp_path: Path) -> None:
    checkpoint = packed("demo", recipe="fast", rank=3)
    made = zqfp_convert.export(checkpoint, tmp_path / "ct")
    assert made.adapter == tmp_path / "ct" / "lorc-adapter"
    card = (tmp_path / "ct" / "README.md").read_text()
    assert "--lora-modules lorc=FOLDER/lorc-adapter" in card
    ids = token_ids()
    model = loaded(tmp_path / "ct", torch.float32)
    without = logits(model, ids)
    have = logits(peft.PeftModel.from_pretrained(model, made.adapter), ids)
    want = logits(dequantized(checkpoint, torch.float32, merged=True), ids)
    assert relative(have - want, want) < 1e-5
    assert relative(without - want, want) > 0.05


def test_ranks_that_differ_are_padded(packed: Packer, tmp_path: Path) -> None:
    # 40 is more than the 32 outputs that keys and values have: their rank is 32
    checkpoint = packed("qwen2", rank=40)
    made = zqfp_convert.export(checkpoint, tmp_path / "ct")
    assert {entry["rank"] for entry in manifest(checkpoint)["layers"].values()} == {32, 40}
    model = loaded(tmp_path / "ct", torch.float32)
    have = logits(peft.PeftModel.from_pretrained(model, made.adapter), token_ids())
    want = logits(dequantized(checkpoint, torch.float32, merged=True), token_ids())
    assert relative(have - want, want) < 1e-5


def test_layers_left_alone_are_ignored(packed: Packer, tmp_path: Path) -> None:
    checkpoint = packed("qwen2", ignore=["lm_head", "model.layers.0.*", "o_proj"])
    zqfp_convert.export(checkpoint, tmp_path / "ct")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.layers.1.self_attn.o_proj"} < set(config["ignore"])
    assert len([name for name in config["ignore"] if ".layers.0." in name]) == 7
    have = plain(tmp_path / "ct")
    assert not hasattr(have.model.layers[0].mlp.up_proj, "quantization_scheme")
    assert have.model.layers[1].mlp.up_proj.quantization_scheme.input_activations.num_bits == 8
    want = dequantized(checkpoint)
    assert torch.equal(logits(loaded(tmp_path / "ct"), token_ids()), logits(want, token_ids()))


def test_row_scales_that_are_powers_of_two(packed: Packer, tmp_path: Path) -> None:
    source = packed("qwen2")
    checkpoint = tmp_path / "packed"
    shutil.copytree(source, checkpoint)
    shutil.copytree(source.with_name("source"), tmp_path / "source")

    def to_m2(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            largest = tensors[name].amax(1)
            tensors[name] += 127 - largest[:, None]
            row_scale = name.replace("weight_scale", "weight_row_scale")
            tensors[row_scale] = (2.0 ** (largest.double() - 127)).bfloat16()

    rewrite(checkpoint, to_m2)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["weights"]["scales"] = "m2"
    (checkpoint / "config.json").write_text(json.dumps(config))
    zqfp_convert.export(checkpoint, tmp_path / "ct")
    zqfp_convert.export(source, tmp_path / "from-m1")
    have, want = read_tensors(tmp_path / "ct"), read_tensors(tmp_path / "from-m1")
    assert all(torch.equal(have[name], tensor) for name, tensor in want.items())
    assert have.keys() == want.keys()


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("qwen2", {"scales": "m2"}, "row scales .M2. that are no powers of two.*--scales m1"),
        ("qwen2", {"scales": "free"}, "free scales.*--scales m1 --codebooks e2m1"),
        ("qwen2", {"scales": "m2", "codebooks": "pair", "recipe": "best"}, "--codebooks e2m1"),
        ("llama", {}, "172 columns in groups of 32.*--to bf16"),
        ("gpt2", {}, "a Conv1D.*--to bf16"),
        ("gpt_oss", {"config": {"intermediate_size": 64}}, "experts lie in one tensor"),
        ("mixtral", {"config": {"intermediate_size": 64}, "rank": 2}, "of an expert.*--rank 0"),
    ],
)
def test_what_cannot_be_held_is_refused(
    packed: Packer, tmp_path: Path, arch: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        zqfp_convert.export(packed(arch, **options), tmp_path / "ct")
    assert not list(tmp_path.iterdir())


def test_spans_of_what_is_fused() -> None:
    layer = "model.layers.0"
    ranges = {
        f"{layer}.self_attn.q_proj": (117, 125),
        f"{layer}.self_attn.k_proj": (113, 120),
        f"{layer}.self_attn.v_proj": (114, 120),
        f"{layer}.mlp.gate_proj": (110, 115),
        f"{layer}.mlp.up_proj": (104, 110),
        f"{layer}.mlp.down_proj": (100, 113),
    }
    fused = f"{layer}.self_attn: k_proj, q_proj, v_proj"
    assert wide(ranges) == {fused: 12, f"{layer}.mlp: down_proj": 13}


def test_spans_are_listed_and_zeros_do_not_count(packed: Packer, tmp_path: Path) -> None:
    model = plain(packed("qwen2").with_name("source"))
    first = model.model.layers[0].self_attn
    first.q_proj.weight.data[0] *= 2.0**-9  # q's smallest row is far below k's largest one
    first.k_proj.weight.data[0] *= 2.0**9
    first.v_proj.weight.data[3] = 0
    model.save_pretrained(tmp_path / "source")
    options = {"recipe": "fast", "scales": "m1", "group_size": 32, "device": "cpu"}
    zqfp_convert.convert(tmp_path / "source", tmp_path / "packed", **options)
    made = zqfp_convert.export(tmp_path / "packed", tmp_path / "ct")
    (name,) = made.wide
    assert name == "model.layers.0.self_attn: k_proj, q_proj, v_proj"
    assert 18 <= made.wide[name] <= 24
    scales = read_tensors(tmp_path / "ct")["model.layers.0.self_attn.v_proj.weight_scale"]
    assert int(scales[3].min()) == int(scales.max()) < 127
    assert json.loads(json.dumps(made.to_json()))["wide"] == made.wide


def test_a_bias_that_the_architecture_has_not(packed: Packer, tmp_path: Path) -> None:
    checkpoint = packed("falcon", recipe="best")
    assert "bias_added" in manifest(checkpoint)["changed"].values()
    for to in ("compressed-tensors", "bf16"):
        with pytest.raises(SourceError, match=r"the architecture has not.*--offset none"):
            zqfp_convert.export(checkpoint, tmp_path / to, to)


def test_scales_beyond_e8m0_are_refused(packed: Packer, tmp_path: Path) -> None:
    from packed_layers import random_layer

    from zqfp_convert.exporting import microscaling

    layer = random_layer("m2", columns=64)
    assert layer.row_scale is not None
    layer.row_scale[:] = 2.0**-130
    with pytest.raises(SourceError, match="2\\^-127 to 2\\^127"):
        microscaling.exponents(layer)
