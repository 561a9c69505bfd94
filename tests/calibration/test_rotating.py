"""A rotated residual stream: the same function, taken where it pays, refused where it cannot be."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import zqfp1_reader
from architectures import (
    ARCHITECTURES,
    LIKE_LLAMA,
    QUICK,
    TIED,
    VOCABULARY,
    Maker,
    random_model,
    token_ids,
    write_model,
)
from dequantized import read_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Lfm2Config, PreTrainedModel

import zqfp_convert
from zqfp_convert.checkpoint.output import partial
from zqfp_convert.cli import convert as command
from zqfp_convert.conversion import rehearsal
from zqfp_convert.errors import OptionError, OutputError
from zqfp_convert.numerics import hadamard
from zqfp_convert.plan import disk, make_plan
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
            rotated = after.read([name])[name]
            assert not torch.equal(rotated, before.read([name])[name]), name
            assert torch.equal(torch.cat([*after.pieces(name, 64)]), rotated.flatten()), name


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2", "cohere"])
def test_a_rotated_conversion(arch: str, tiny_model: Maker, tmp_path: Path) -> None:
    source = tiny_model(arch)
    made = zqfp_convert.convert(source, tmp_path / "out", rotation="residual", rank=4, **WITHOUT)
    proved = verify(made.out, source)
    assert len(proved.errors) == len(made.layers)
    assert len(zqfp1_reader.read(made.out).layers) == len(made.layers)
    assert max(proved.errors.values()) < 0.5
    assert all("rotated" in entry for entry in made.layers.values())
    assert all(p.is_meta for p in made.plan.model.parameters())
    config = json.loads((made.out / "config.json").read_text())
    assert config["quantization_config"]["recipe"]["rotation"] == "residual"
    assert arch not in TIED or config["tie_word_embeddings"] is False
    assert made.bytes_after - made.plan.bytes_after < 4096 * len(made.layers)  # float32 biases
    packed = zqfp_convert.load(made.out, device="cpu", dtype=torch.float32)
    want = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    plain = zqfp_convert.convert(source, tmp_path / "plain", rank=4, **QUICK)
    beside = logits(zqfp_convert.load(plain.out, device="cpu", dtype=torch.float32))
    assert (logits(packed) - want).norm() < 1.5 * (beside - want).norm()


def test_layers_left_alone_keep_their_dtype(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "llama", torch.bfloat16)
    alone = ("o_proj", "up_proj")
    made = zqfp_convert.convert(
        source, tmp_path / "out", rotation="residual", ignore=alone, **WITHOUT
    )
    tensors = read_tensors(made.out)
    left = [name for name in tensors if name.endswith(("o_proj.weight", "up_proj.weight"))]
    assert len(left) == 4
    assert {tensors[name].dtype for name in left} == {torch.bfloat16}
    assert made.bytes_after == pytest.approx(made.plan.bytes_after, rel=0.1)
    verify(made.out, source)
    packed = zqfp_convert.load(made.out, device="cpu", dtype=torch.float32)
    want = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    assert (logits(packed) - want).norm() < 0.3 * want.norm()


def test_a_head_that_is_tied_and_stored(tiny_model: Maker, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model("opt"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    made = zqfp_convert.convert(source, tmp_path / "out", rotation="residual", **WITHOUT)
    config = json.loads((made.out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    packed = zqfp_convert.load(made.out, device="cpu", dtype=torch.float32)
    want = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    assert (logits(packed) - want).norm() < 0.3 * want.norm()


def test_blocks_of_several_kinds(tmp_path: Path) -> None:
    config = Lfm2Config(**LIKE_LLAMA, layer_types=["full_attention", "conv"])
    random_model(config).save_pretrained(tmp_path / "source")
    made = zqfp_convert.convert(tmp_path / "source", tmp_path / "out", rotation="auto", **WITHOUT)
    assert made.plan.rotation is None


def test_no_room_for_a_head(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(out: Path, needed: int) -> None:
        raise OutputError("here", "no room", needed="more", do="Make room.")

    recipe = Recipe.named("best", group_size=32)
    plan = make_plan(tiny_model("opt"), tmp_path / "out", recipe=recipe, device="cpu")
    monkeypatch.setattr("zqfp_convert.plan.plan.check_room", full)
    told: list[str] = []
    report = lambda text, *rest: told.append(text)  # noqa: E731
    chosen = rehearsal.choose_rotation(plan, token_ids(4, 32), report)
    assert told[-1] == "no rotation: no room on the disk for the head"
    assert chosen.rotation is None
    assert chosen.recipe.rotation == "none"
    wanted = dataclasses.replace(plan, recipe=recipe.changed(rotation="residual"))
    with pytest.raises(OutputError, match="no room"):
        rehearsal.choose_rotation(wanted, token_ids(4, 32), lambda *said: None)


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_the_plan_says_whether_there_is_room_for_a_head(
    arch: str, tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.named("best", group_size=32)
    plan = make_plan(tiny_model(arch), tmp_path / "out", recipe=recipe, device="cpu")
    more = disk.untied_bytes(plan)
    tied = arch in TIED
    assert tied is (arch == "opt")
    assert more == (4 * VOCABULARY * 64 if tied else 0)
    enough = disk.output_bytes(plan) + more
    for free in (enough, enough - 1):
        monkeypatch.setattr(partial, "room", lambda out, free=free: free)
        said = command._rotation(plan)
        refused = tied and free < enough
        assert ("none, as the disk has no room for the tied head" in said) is refused
        assert ("a rehearsal decides" in said) is not refused


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
