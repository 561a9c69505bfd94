"""The whole way on every architecture: convert, load, and the same logits as the dense model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from architectures import (
    ARCHITECTURES,
    QUICK,
    TIED,
    WITH_LAYER_NORMS,
    Maker,
    token_ids,
    write_model,
)
from dequantized import dense, manifest, read_tensors
from torch import Tensor, nn

import zqfp_convert
from zqfp_convert.runtime.linear import QuantizedLinear

RECIPES = ("fast", "best")
LINEARS = {"phi3": 4, "gpt2": 4, "gpt_neox": 4, "falcon": 4, "bloom": 4, "opt": 6}  # others 7

every_model = pytest.mark.parametrize("arch", ARCHITECTURES)
every_conversion = pytest.mark.parametrize(
    ("arch", "recipe"), [(arch, recipe) for arch in ARCHITECTURES for recipe in RECIPES]
)


def relative(error: Tensor, whole: Tensor) -> float:
    return float(error.double().norm() / whole.double().norm())


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def original(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@every_conversion
@torch.no_grad()
def test_each_linear_alone(arch: str, recipe: str, converted: Maker) -> None:
    folder = converted(arch, recipe)
    model = zqfp_convert.load(folder, device="cpu")
    layers = quantized_linears(model)
    assert len(layers) == 2 * LINEARS.get(arch, 7)
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda module, args, out, name=name: calls.update({name: (args[0], out.clone())})
        )
    model(token_ids())
    tensors = read_tensors(folder)
    assert calls.keys() == layers.keys()
    for name, (x, y) in calls.items():
        want = dense(folder, tensors, layers[name].name)(x)
        assert relative(y - want, want) < 1e-5, name


@every_conversion
@torch.no_grad()
def test_logits_of_the_dequantized_model(arch: str, recipe: str, converted: Maker) -> None:
    folder = converted(arch, recipe)
    model = zqfp_convert.load(folder, device="cpu")
    dequantized = copy.deepcopy(model)
    tensors = read_tensors(folder)
    for name, layer in quantized_linears(dequantized).items():
        path, _, leaf = name.rpartition(".")
        new = dense(folder, tensors, layer.name, torch.float32)
        setattr(dequantized.get_submodule(path), leaf, new)
    have, want = model(token_ids()).logits, dequantized(token_ids()).logits
    assert have.dtype == torch.float32
    assert relative(have - want, want) < 1e-3


@every_model
@torch.no_grad()
def test_best_is_closer_to_the_original_than_fast(
    arch: str, tiny_model: Maker, converted: Maker
) -> None:
    want = original(tiny_model(arch))(token_ids(8)).logits
    error = {}
    for recipe in RECIPES:
        model = zqfp_convert.load(converted(arch, recipe), device="cpu")
        error[recipe] = relative(model(token_ids(8)).logits - want, want)
    assert 0 < error["best"] < 0.9 * error["fast"], error
    assert error["best"] < 0.4


@every_conversion
def test_generates(arch: str, recipe: str, converted: Maker) -> None:
    model = zqfp_convert.load(converted(arch, recipe), device="cpu")
    prompt = token_ids(1, 5)
    first = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert first.shape == (1, 10)
    with torch.no_grad():  # with the cache it goes on as without
        assert torch.equal(model(first).logits[0, 4:-1].argmax(-1), first[0, 5:])


@every_conversion
def test_tied_embeddings_stay_tied(
    arch: str, recipe: str, tiny_model: Maker, converted: Maker
) -> None:
    model = zqfp_convert.load(converted(arch, recipe), device="cpu")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(head) is nn.Linear
    assert (head.weight.data_ptr() == embedding.weight.data_ptr()) is (arch in TIED)
    before = original(tiny_model(arch))
    assert torch.equal(head.weight, before.get_output_embeddings().weight)
    assert torch.equal(embedding.weight, before.get_input_embeddings().weight)


@every_conversion
def test_only_what_the_manifest_names_is_changed(
    arch: str, recipe: str, tiny_model: Maker, converted: Maker
) -> None:
    folder = converted(arch, recipe)
    before, after, notes = read_tensors(tiny_model(arch)), read_tensors(folder), manifest(folder)
    quantized = {f"{layer}.weight" for layer in notes["layers"]}
    added = {name for name, kind in notes["changed"].items() if kind == "bias_added"}
    assert quantized <= before.keys()
    assert added.isdisjoint(before)
    packed = {n for n in after if n.rpartition(".")[0] in notes["layers"]} - set(before) - added
    assert after.keys() - packed == (before.keys() - quantized) | added
    for name in before.keys() - quantized - notes["changed"].keys():
        assert torch.equal(before[name], after[name]), name
    for name in notes["changed"].keys() - added:
        assert before[name].shape == after[name].shape
        assert not torch.equal(before[name], after[name]), name
    assert bool(notes["changed"]) is (recipe == "best" and arch in WITH_LAYER_NORMS)


@every_model
def test_bfloat16_stays_bfloat16(arch: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", arch, torch.bfloat16)
    result = zqfp_convert.convert(source, tmp_path / "out", recipe="best", **QUICK)
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    for name in before.keys() & after.keys() - result.changed.keys():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)), name
    for name, kind in result.changed.items():
        norm = kind == "norm_changed"
        assert after[name].dtype == (torch.bfloat16 if norm else torch.float32), name
    model = zqfp_convert.load(tmp_path / "out", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        have, want = model(token_ids()).logits, original(source)(token_ids()).logits
    assert have.dtype == torch.bfloat16
    assert relative(have - want, want) < 0.4


@every_conversion
def test_the_plan_foretells_the_size(
    arch: str, recipe: str, tiny_model: Maker, tmp_path: Path, converted: Maker
) -> None:
    plan = zqfp_convert.plan.make_plan(
        tiny_model(arch),
        tmp_path / "out",
        recipe=zqfp_convert.Recipe.named(recipe, group_size=32, samples=12, seq_len=32),
        device="cpu",
    )
    folder = converted(arch, recipe)
    notes, tensors = manifest(folder), read_tensors(folder)
    added = sum(tensors[n].nbytes for n, kind in notes["changed"].items() if kind == "bias_added")
    weights = sum(tensor.nbytes for tensor in tensors.values())
    assert plan.bytes_after == weights - added
    packed = sum(
        tensor.nbytes
        for name, tensor in tensors.items()
        if name.rpartition(".")[0] in notes["layers"] and not name.endswith(".bias")
    )
    assert plan.bits == pytest.approx(8 * packed / plan.weights)
    assert json.dumps(plan.to_json())
