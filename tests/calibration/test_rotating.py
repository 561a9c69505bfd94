"""A rotated residual stream: the same function, taken where it pays, refused where it cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import zqfp1_reader
from architectures import ARCHITECTURES, QUICK, TIED, Maker, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import zqfp_convert
from zqfp_convert.conversion import rehearsal
from zqfp_convert.errors import OptionError
from zqfp_convert.numerics import hadamard
from zqfp_convert.plan import make_plan
from zqfp_convert.recipe import Recipe
from zqfp_convert.verify import verify

DEMO = Path(__file__).parents[2] / "zqfp_convert" / "demo" / "model"
# Norms behind the linears (gemma3, olmo2), a norm behind the embedding (bloom).
NOT_FOR = ("gemma3", "olmo2", "bloom")
ALLOWED = [arch for arch in ARCHITECTURES if arch not in NOT_FOR]
WITHOUT = {key: value for key, value in QUICK.items() if key != "rotation"}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(token_ids()).logits.float()
    return found


@pytest.mark.parametrize("arch", ALLOWED)
def test_the_rotated_source_is_the_same_function(
    arch: str, tiny_model: Maker, tmp_path: Path
) -> None:
    source = tiny_model(arch)
    recipe = Recipe.named("best", rotation="residual", group_size=32)
    plan = make_plan(source, tmp_path / "out", recipe=recipe, device="cpu")
    turned = rehearsal.choose_rotation(plan, token_ids(4, 32), lambda *said: None)
    assert turned.rotation is not None
    assert (turned.rotation.tied_to is not None) is (arch in TIED)
    model = turned.model
    rehearsal.fill(turned, model, "", turned.names.to_model)
    want = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    before, after = plan.source.shards, turned.source.shards
    for name in turned.rotation.changed - {turned.rotation.head}:
        if before.read([name])[name].std() > 0:  # a bias of zeros stays one
            assert not torch.equal(after.read([name])[name], before.read([name])[name]), name


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2", "cohere"])
def test_a_rotated_conversion(arch: str, tiny_model: Maker, tmp_path: Path) -> None:
    source = tiny_model(arch)
    made = zqfp_convert.convert(source, tmp_path / "out", rotation="residual", rank=4, **WITHOUT)
    proved = verify(made.out, source)
    assert len(proved.errors) == len(made.layers)
    assert len(zqfp1_reader.read(made.out).layers) == len(made.layers)
    assert max(proved.errors.values()) < 0.5
    assert all("rotated" in entry for entry in made.layers.values())
    config = json.loads((made.out / "config.json").read_text())
    assert config["quantization_config"]["recipe"]["rotation"] == "residual"
    assert arch not in TIED or config["tie_word_embeddings"] is False
    assert made.bytes_after - made.plan.bytes_after < 4096 * len(made.layers)  # float32 biases
    packed = zqfp_convert.load(made.out, device="cpu", dtype=torch.float32)
    want = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    plain = zqfp_convert.convert(source, tmp_path / "plain", rank=4, **QUICK)
    beside = logits(zqfp_convert.load(plain.out, device="cpu", dtype=torch.float32))
    assert (logits(packed) - want).norm() < 1.5 * (beside - want).norm()


@pytest.mark.parametrize("arch", NOT_FOR)
def test_what_cannot_be_rotated(arch: str, tiny_model: Maker, tmp_path: Path) -> None:
    source = tiny_model(arch)
    with pytest.raises(OptionError, match="residual stream through norms alone"):
        zqfp_convert.convert(source, tmp_path / "out", rotation="residual", **WITHOUT)
    assert not (tmp_path / "out").exists()
    made = zqfp_convert.convert(source, tmp_path / "out", rotation="auto", **WITHOUT)
    assert made.plan.recipe.rotation == "none"


def test_chosen_where_it_pays(tmp_path: Path) -> None:
    """Two channels that vary much and are weighted much: FP8 spoils them unless they are mixed."""
    source = tmp_path / "source"
    shutil.copytree(DEMO, source)
    tensors = load_file(source / "model.safetensors")
    widths = {t.shape[0] for name, t in tensors.items() if name.endswith("layernorm.weight")}
    assert all(hadamard.block_of(width) >= 16 for width in widths)
    small = {"samples": 8, "seq_len": 64, "rank": 0, "sweeps": 0, "device": "cpu"}
    plain = zqfp_convert.convert(source, tmp_path / "plain", **small)
    assert plain.plan.recipe.rotation == "none"
    for name, tensor in tensors.items():
        if name.endswith("self_attn.k_proj.weight"):
            tensor[:, [3, 70]] *= 12
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    turned = zqfp_convert.convert(source, tmp_path / "turned", **small)
    assert turned.plan.recipe.rotation == "residual"


def test_with_tuning(tmp_path: Path) -> None:
    small = {"samples": 4, "seq_len": 64, "rank": 0, "sweeps": 0, "device": "cpu"}
    small |= {"rotation": "residual", "tune": 2, "tune_samples": 0}
    made = zqfp_convert.convert(DEMO, tmp_path / "out", **small)
    assert len(verify(made.out, DEMO).errors) == len(made.layers)
