"""Exports to bfloat16, loaded by transformers as any other model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import token_ids
from dequantized import manifest, read_tensors
from exported_models import Packer, dequantized, logits, plain, source_of, weights
from huggingface_hub import metadata_load
from mixtures import EXPERT, fused
from transformers import AutoTokenizer

import zqfp_convert


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {"recipe": "best", "rank": 4}),
        ("llama", {"scales": "free", "group_size": "row"}),
        ("gpt2", {"rank": 2}),  # its weights lie the other way round
        ("opt", {"recipe": "best", "rotation": "residual", "rank": 0}),  # its head is tied no more
        ("gemma3", {}),
    ],
)
def test_logits_are_those_of_the_dequantized_model(
    packed: Packer, tmp_path: Path, arch: str, options: dict[str, Any]
) -> None:
    pair = {"codebooks": None, "scales": None} if options.get("recipe") == "best" else {}
    checkpoint = packed(arch, **{**pair, **options})
    made = zqfp_convert.export(checkpoint, tmp_path / "bf16", "bf16")
    have = plain(tmp_path / "bf16")
    assert have.dtype == torch.bfloat16
    want = dequantized(checkpoint, merged=True)
    assert torch.equal(logits(have, token_ids()), logits(want, token_ids()))
    assert made.bytes == sum(path.stat().st_size for path in (tmp_path / "bf16").iterdir())


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss", "llama4"])
def test_experts_lie_as_in_the_source(packed: Packer, tmp_path: Path, arch: str) -> None:
    checkpoint = packed(arch, rank=2)
    zqfp_convert.export(checkpoint, tmp_path / "bf16", "bf16")
    before, have = read_tensors(source_of(checkpoint)), read_tensors(tmp_path / "bf16")
    assert {name: t.shape for name, t in have.items()} == {n: t.shape for n, t in before.items()}
    own, tensors = weights(checkpoint, merged=True), read_tensors(checkpoint)
    parts = {f"{name}.weight": weight for name, weight in own.items()}
    parts |= {name: tensor.double() for name, tensor in tensors.items()}
    want = {n: t for n, t in parts.items() if n in before} | fused(parts, before)
    for name, tensor in have.items():
        exact = want[name]
        away, least = ((x.double() - exact).abs() for x in (tensor, exact.bfloat16()))
        assert bool((away <= least + 1e-6).all()), name  # the nearest, but for ties in float32
    assert bool(EXPERT.match(next(n for n in have if "expert" in n))) is (arch == "qwen3_moe")
    assert logits(plain(tmp_path / "bf16"), token_ids()).isfinite().all()


def test_other_files_and_the_configuration(packed: Packer, tmp_path: Path) -> None:
    checkpoint = packed("llama")
    zqfp_convert.export(checkpoint, tmp_path / "bf16", "bf16")
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    names = {path.name for path in (tmp_path / "bf16").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "model.safetensors"} <= names
    assert not {"zqfp_manifest.json", "model.safetensors.index.json"} & names
    text = "a tokenizer like the original's"
    one, other = (AutoTokenizer.from_pretrained(p) for p in (checkpoint, tmp_path / "bf16"))
    assert one(text)["input_ids"] == other(text)["input_ids"]


def test_the_card_and_what_is_left(packed: Packer, tmp_path: Path) -> None:
    """The licence goes with the weights; what is about the packed checkpoint does not."""
    checkpoint = Path(shutil.copytree(packed("llama"), tmp_path / "packed"))
    about = json.loads((checkpoint / "config.json").read_text())
    source = {"name": "maker/model", "repository": "maker/model", "card": {"license": "mit"}}
    about["quantization_config"]["source"] = source
    (checkpoint / "config.json").write_text(json.dumps(about))
    (checkpoint / "LICENSE").write_text("Some terms.")
    for name in ("report.html", "report.png", "zqfp_evaluation.json"):
        (checkpoint / name).write_text("{}")
    zqfp_convert.export(checkpoint, tmp_path / "bf16", "bf16")
    names = {path.name for path in (tmp_path / "bf16").iterdir()}
    assert {"README.md", "LICENSE", "tokenizer.json"} <= names
    assert not {"report.html", "report.png", "zqfp_evaluation.json"} & names
    data = metadata_load(tmp_path / "bf16" / "README.md")
    assert (data["license"], data["library_name"]) == ("mit", "transformers")
    assert (data["base_model"], data["base_model_relation"]) == ("maker/model", "quantized")
    text = (tmp_path / "bf16" / "README.md").read_text()
    for said in ("# model, 4-bit weights in bfloat16", "huggingface.co/maker/model", "vllm serve"):
        assert said in text
    assert "zqfp" not in data["tags"]


def test_shards_and_their_index(
    packed: Packer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = packed("llama")
    monkeypatch.setattr("zqfp_convert.exporting.folder.SHARD", 30_000)
    zqfp_convert.export(checkpoint, tmp_path / "bf16", "bf16")
    index = json.loads((tmp_path / "bf16" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 5
    have, want = plain(tmp_path / "bf16"), dequantized(checkpoint)
    assert torch.equal(logits(have, token_ids()), logits(want, token_ids()))


def test_a_float32_model_is_cast(tiny_model: Packer, tmp_path: Path) -> None:
    options = {"recipe": "fast", "group_size": 32, "device": "cpu"}
    zqfp_convert.convert(tiny_model("llama"), tmp_path / "packed", **options)
    zqfp_convert.export(tmp_path / "packed", tmp_path / "bf16", "bf16")
    tensors = read_tensors(tmp_path / "bf16")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == len(read_tensors(tiny_model("llama")))
    assert set(manifest(tmp_path / "packed")["layers"]) == {
        name.removesuffix(".weight") for name in tensors if "_proj" in name
    }
