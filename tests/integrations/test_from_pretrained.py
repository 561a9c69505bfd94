"""`from_pretrained` on packed checkpoints: the same model as `zqfp_convert.load` gives."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import token_ids
from dequantized import manifest
from kinds import Packed
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    pipeline,
)

import zqfp_convert
from zqfp_convert.errors import CheckpointError, OptionError, SourceError
from zqfp_convert.integrations.transformers import packing
from zqfp_convert.runtime.linear import QuantizedLinear

KINDS = [
    "llama",
    "opt",
    "gpt2",
    "qwen3",
    "gemma3",
    "rotated",
    "added",
    "mixtral",
    "gpt_oss",
    "left",
]


@torch.no_grad()
def logits(model: transformers.PreTrainedModel) -> Tensor:
    return model(token_ids()).logits


def loaded(folder: Path) -> Tensor:
    return logits(zqfp_convert.load(folder, device="cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_load(kind: str, packed: Packed, caplog: pytest.LogCaptureFixture) -> None:
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    try:
        model = AutoModelForCausalLM.from_pretrained(packed(kind))
    finally:
        transformers.logging.disable_propagation()
        transformers.logging.set_verbosity_error()
    assert not [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert torch.equal(logits(model), loaded(packed(kind)))
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert {layer.name for layer in layers} == set(manifest(packed(kind))["layers"])
    assert len({id(layer._scratch) for layer in layers}) == 1
    assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
    assert any(name.endswith("weight_packed") for name in model.state_dict())
    assert not model.training
    assert model.is_quantized
    assert model.config.quantization_config.quant_method == "zqfp"


def test_siblings_are_linked(packed: Packed) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed("llama"))
    attention = model.model.layers[0].self_attn
    assert attention.q_proj._siblings is attention.v_proj._siblings is not None


@pytest.mark.parametrize("kind", ["llama", "mixtral"])  # mixtral's router has another name on disk
def test_dtype(kind: str, packed: Packed) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed(kind), dtype=torch.bfloat16)
    ours = zqfp_convert.load(packed(kind), device="cpu", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(ours))


def test_pipeline_and_generation(packed: Packed) -> None:
    folder = packed("llama")
    generator = pipeline("text-generation", model=str(folder))
    assert isinstance(generator.model.model.layers[0].mlp.up_proj, QuantizedLinear)
    have = generator("the fox", max_new_tokens=8, do_sample=False, return_tensors=True)
    ids = generator.tokenizer("the fox", return_tensors="pt").input_ids
    ours = zqfp_convert.load(folder, device="cpu")
    want = ours.generate(ids, max_new_tokens=8, do_sample=False)
    assert have[0]["generated_token_ids"] == want[0].tolist()


def test_other_heads_on_the_same_body(packed: Packed) -> None:
    body = AutoModel.from_pretrained(packed("llama"))
    whole = AutoModelForCausalLM.from_pretrained(packed("llama"))
    ids = token_ids()
    with torch.no_grad():
        want = whole.model(ids).last_hidden_state
        assert torch.equal(body(ids).last_hidden_state, want)
        head = AutoModelForSequenceClassification.from_pretrained(packed("llama"), num_labels=3)
        assert torch.equal(head.model(ids).last_hidden_state, want)


def test_copies(packed: Packed) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed("llama"))
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), logits(model))
    assert again.save_pretrained._model is again


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(device_map: object, packed: Packed) -> None:
    pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(packed("llama"), device_map=device_map)
    assert torch.equal(logits(model), loaded(packed("llama")))


@pytest.mark.parametrize("dequantize", [False, True])
def test_several_devices(dequantize: bool, packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two names of one CPU, for which accelerate puts its hooks as for two GPUs."""
    modeling = pytest.importorskip("accelerate.utils.modeling")
    monkeypatch.setattr(modeling, "check_device_same", lambda one, other: one.type == other.type)
    first, second = "cpu:0", torch.device("cpu:0")
    places = {
        "model.embed_tokens": first,
        "model.rotary_emb": first,
        "model.layers.0": first,
        "model.layers.1.self_attn": second,
        "model.layers.1.mlp.gate_proj": first,
        "model.layers.1.mlp.up_proj": second,
        "model.layers.1.mlp.down_proj": second,
        "model.layers.1.input_layernorm": second,
        "model.layers.1.post_attention_layernorm": first,
        "model.norm": second,
        "lm_head": second,
    }
    how = {"quantization_config": zqfp_convert.ZqfpConfig(dequantize=dequantize)}
    model = AutoModelForCausalLM.from_pretrained(packed("llama"), device_map=places, **how)
    whole = AutoModelForCausalLM.from_pretrained(packed("llama"), **how)
    assert hasattr(model.model.layers[1].mlp.up_proj, "_hf_hook")
    assert torch.equal(logits(model), logits(whole))


def test_the_size_that_transformers_sees(
    packed: Packed, source: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For `device_map="auto"`: packed bytes count, unless weights will be plain ones."""
    accelerate = pytest.importorskip("transformers.integrations.accelerate")
    infer, sizes = accelerate.infer_auto_device_map, []

    def inferred(model: transformers.PreTrainedModel, *args: object, **options: Any) -> object:
        quantizer = options["hf_quantizer"]
        sizes.append(accelerate.compute_module_sizes(model, quantizer)[0]["model.layers"])
        return infer(model, *args, **options)

    monkeypatch.setattr(accelerate, "infer_auto_device_map", inferred)
    plain = zqfp_convert.ZqfpConfig(dequantize=True)
    for folder, how in ((packed, {}), (packed, {"quantization_config": plain}), (source, {})):
        AutoModelForCausalLM.from_pretrained(folder("llama"), device_map="auto", **how)
    small, dequantized, original = sizes
    assert 0 < small < 0.35 * original  # norms and low-rank factors beside 4 bits of 32
    assert original <= dequantized < 1.2 * original


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_offloading_is_refused(place: str, packed: Packed, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    places = {"model": "cpu:0", "lm_head": place}
    with pytest.raises(OptionError, match="not offloaded") as raised:
        AutoModelForCausalLM.from_pretrained(
            packed("llama"), device_map=places, offload_folder=tmp_path
        )
    assert raised.value.where == "device_map"


def test_a_model_that_is_not_packed(source: Packed) -> None:
    with pytest.raises(OptionError, match="zqfp-convert MODEL OUT"):
        AutoModelForCausalLM.from_pretrained(
            source("llama"), quantization_config=zqfp_convert.ZqfpConfig()
        )


def test_a_state_dict_instead_of_files(packed: Packed) -> None:
    config = transformers.AutoConfig.from_pretrained(packed("llama"))
    with pytest.raises(OptionError, match="state_dict"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})


@pytest.mark.parametrize("what", ["missing", "damaged", "another"])
def test_checkpoints_that_are_not_whole(what: str, packed: Packed, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed("llama"), tmp_path / "packed"))
    about = json.loads((folder / "zqfp_manifest.json").read_text())
    if what == "missing":
        (folder / "zqfp_manifest.json").unlink()
    elif what == "damaged":
        next(iter(about["layers"].values()))["span"] = 77
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    if what == "damaged":
        (folder / "zqfp_manifest.json").write_text(json.dumps(about))
    rules = {"missing": "missing-file", "damaged": "bad-manifest", "another": "missing-tensor"}
    with pytest.raises(CheckpointError) as raised:
        AutoModelForCausalLM.from_pretrained(folder)
    assert raised.value.rule == rules[what]


def test_the_manifest_comes_from_the_hub(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers downloads what it knows, so of a packed checkpoint not the manifest."""
    cache, commit = tmp_path / "models--someone--model", "0123456789" * 4
    folder = cache / "snapshots" / commit
    shutil.copytree(packed("llama"), folder)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    (folder / "zqfp_manifest.json").unlink()
    with pytest.raises(SourceError, match="hf auth login"):
        AutoModelForCausalLM.from_pretrained("someone/model", cache_dir=tmp_path)
    asked = []

    def download(repository: str, file: str, **where: object) -> None:
        asked.append((repository, file, where))
        shutil.copy(packed("llama") / file, folder)

    monkeypatch.setattr(packing, "hf_hub_download", download)
    model = AutoModelForCausalLM.from_pretrained("someone/model", cache_dir=tmp_path)
    assert torch.equal(logits(model), loaded(packed("llama")))
    where = {"revision": commit, "cache_dir": tmp_path}
    assert asked == [("someone/model", "zqfp_manifest.json", where)]
