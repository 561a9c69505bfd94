"""Names on disk and names in the model: one mapping, both ways, as transformers itself loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, QUICK, TIED, Maker, random_model, token_ids, write_model
from dequantized import manifest, read_tensors
from safetensors.torch import save_file
from torch import Tensor

import zqfp_convert
from zqfp_convert.model import skeleton
from zqfp_convert.model.names import NameMap


def name_map(folder: Path) -> NameMap:
    return NameMap(skeleton.build(folder), read_tensors(folder))


def rename(folder: Path, new_name: Callable[[str], str]) -> Path:
    """Spell the tensors of a folder with one shard otherwise."""
    tensors = {new_name(name): tensor for name, tensor in read_tensors(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def add(folder: Path, extra: dict[str, Tensor]) -> Path:
    tensors = {**read_tensors(folder), **extra}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_as_transformers(folder: Path) -> None:
    """Every tensor lands where `from_pretrained` puts it."""
    names, tensors = name_map(folder), read_tensors(folder)
    state = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert names.to_model.keys() | set(names.unused) == tensors.keys()
    for name, place in names.to_model.items():
        assert torch.equal(tensors[name], state[place]), name
        assert names.to_disk[place] == name
    for place, name in names.to_disk.items():
        assert names.to_model[name] == place
    assert not names.missing


def assert_converts(folder: Path, out: Path, recipe: str = "best") -> None:
    """It converts and loads, and what comes out is spelled as the source is."""
    zqfp_convert.convert(folder, out, recipe=recipe, **QUICK)
    before, after, notes = read_tensors(folder), read_tensors(out), manifest(out)
    layers = notes["layers"].keys()
    assert layers
    quantized = {f"{layer}.weight" for layer in layers}
    assert quantized <= before.keys()
    assert before.keys() - quantized <= after.keys()
    new = {name for name in after.keys() - before.keys() if name not in notes["changed"]}
    assert {name.rpartition(".")[0] for name in new} == layers
    model = zqfp_convert.load(out, device="cpu")
    original = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        have, want = model(token_ids()).logits, original(token_ids()).logits
    assert (have - want).norm() < 0.5 * want.norm()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_mapping_is_that_of_transformers(arch: str, tiny_model: Maker) -> None:
    folder = tiny_model(arch)
    assert_as_transformers(folder)
    names = name_map(folder)
    assert not names.unused
    places = skeleton.build(folder).state_dict().keys()
    assert names.to_disk.keys() | set(names.unfilled) == places
    assert bool(names.unfilled) is (arch in TIED)


@pytest.mark.parametrize("arch", ["gpt2", "bloom", "falcon"])
def test_transformer_prefix_on_disk_or_not(arch: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "with", arch)
    assert any(name.startswith("transformer.") for name in read_tensors(folder))
    assert_as_transformers(folder)
    bare = rename(folder, lambda name: name.removeprefix("transformer."))
    assert_as_transformers(bare)
    assert_converts(bare, tmp_path / "out")
    assert "h.0.attn.c_attn" in manifest(tmp_path / "out")["layers"] or arch != "gpt2"


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt_neox"])
def test_base_model_prefix_missing(arch: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", arch)
    prefix = {"llama": "model.", "opt": "model.", "gpt_neox": "gpt_neox."}[arch]
    bare = rename(folder, lambda name: name.removeprefix(prefix))
    assert_as_transformers(bare)
    assert_converts(bare, tmp_path / "out", "fast")


def test_a_base_model_without_head(tmp_path: Path) -> None:
    model = random_model(transformers.LlamaConfig(**ARCHITECTURES["llama"][1]))
    model.base_model.save_pretrained(tmp_path / "untied")
    names = name_map(tmp_path / "untied")
    assert names.missing == ["lm_head.weight"]
    assert names.to_model["layers.0.mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj.weight"

    model.config.tie_word_embeddings = True
    model.base_model.save_pretrained(tmp_path / "tied")
    assert_as_transformers(tmp_path / "tied")


def test_gpt_neox_head(tmp_path: Path) -> None:
    folder = rename(
        write_model(tmp_path / "m", "gpt_neox"),
        lambda name: name.replace("lm_head", "embed_out"),  # as the Hub's checkpoints have it
    )
    names, model = name_map(folder), skeleton.build(folder)
    place = names.to_model["embed_out.weight"]
    assert model.get_submodule(place.removesuffix(".weight")) is model.get_output_embeddings()
    assert_as_transformers(folder)
    assert_converts(folder, tmp_path / "out")
    assert "embed_out.weight" in read_tensors(tmp_path / "out")


LEFT_OVERS = {
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(8.0)},
    "gpt2": {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
    },
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.arange(8.0),
    },
}


@pytest.mark.parametrize("arch", LEFT_OVERS)
def test_left_overs_are_carried_over(arch: str, tmp_path: Path) -> None:
    folder = add(write_model(tmp_path / "m", arch), LEFT_OVERS[arch])
    names = name_map(folder)
    assert sorted(names.unused) == sorted(LEFT_OVERS[arch])
    assert not names.missing
    assert_converts(folder, tmp_path / "out")
    after = read_tensors(tmp_path / "out")
    for name, tensor in LEFT_OVERS[arch].items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    tensors = read_tensors(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert name_map(folder).missing == ["model.layers.1.mlp.up_proj.weight"]


def test_one_of_two_tied_tensors_is_enough(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", tie_word_embeddings=True)
    assert not name_map(folder).missing
    moved = rename(folder, lambda name: name.replace("model.embed_tokens", "lm_head"))
    names = name_map(moved)
    assert not names.missing
    assert names.unfilled == ["model.embed_tokens.weight"]
    assert_converts(moved, tmp_path / "fast", "fast")
    assert_converts(moved, tmp_path / "best", "best")


def multimodal(folder: Path) -> Path:
    """A tiny Gemma 3 that sees."""
    text = {**ARCHITECTURES["gemma3"][1]}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=383
    )
    random_model(config).save_pretrained(folder)
    return folder


def test_multimodal_wrapper(tmp_path: Path) -> None:
    folder = multimodal(tmp_path / "m")
    assert_as_transformers(folder)
    result = zqfp_convert.convert(folder, tmp_path / "out", recipe="best", **QUICK)
    assert len(result.layers) == 14
    assert all("language_model" in name for name in result.layers)
    assert all("language_model" not in name for name in result.plan.left_alone)
    before, after = read_tensors(folder), read_tensors(tmp_path / "out")
    untouched = before.keys() - {f"{layer}.weight" for layer in result.layers}
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    assert any("vision" in name for name in untouched)
    model = zqfp_convert.load(tmp_path / "out", device="cpu")
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    original = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = token_ids().clamp(max=380)
    with torch.no_grad():
        have, want = model(ids).logits, original(ids).logits
    assert (have - want).norm() < 0.5 * want.norm()
