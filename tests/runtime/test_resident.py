"""Linears whose FP8 matrix stays: they compute what any other path does, and know when to."""

from __future__ import annotations

import pytest
import torch
from dequantized import Dense, lorc_of, weight_of
from packed_layers import random_layer
from torch import Tensor

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.numerics import codebook, kernels
from zqfp_convert.numerics.scales import Kind
from zqfp_convert.runtime import resident
from zqfp_convert.runtime.resident import ResidentLinear

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no Triton")

ON = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def products(request: pytest.FixtureRequest) -> None:
    """Of FP8 matrices, on a CPU."""
    if ON.type == "cpu":
        request.getfixturevalue("scaled_mm")


def weight_in(layer: PackedLayer) -> Tensor:
    size = layer.columns, layer.group_size
    return weight_of(layer.tensors(), layer.name, *size, layer.books)


def random(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["m1", "m2"])
@pytest.mark.parametrize("size", [(21, 45), (32, 128), (16, 272)])
@pytest.mark.parametrize("tokens", [(3, 7), (), (17,), (0,)])
@pytest.mark.parametrize(("rank", "biased"), [(0, False), (4, True), (8, False)])
def test_product(
    kind: Kind, size: tuple[int, int], tokens: tuple[int, ...], rank: int, biased: bool
) -> None:
    rows, columns = size
    layer = random_layer(kind, rows, columns, rank=rank, span=4)
    bias = random(rows, seed=1) if biased else None
    x = random(*tokens, columns).bfloat16()
    want = Dense(weight_in(layer), lorc_of(layer.tensors(), layer.name), bias)(x.float())
    here = layer.to(ON)
    linear = ResidentLinear(here, None if bias is None else bias.to(ON))
    have = linear(x.to(ON)).cpu()
    assert have.dtype == torch.bfloat16
    assert have.shape == (*tokens, rows)
    assert float((have.double() - want).norm()) <= 4e-3 * float(want.norm())


def test_many_tokens_and_two_codebooks() -> None:
    layer = random_layer("m2", 48, 160, rank=8, span=6, books=codebook.PAIR)
    x = random(1, 300, 160).bfloat16()
    want = Dense(weight_in(layer), lorc_of(layer.tensors(), layer.name), None)(x.float())
    have = ResidentLinear(layer.to(ON), None)(x.to(ON)).cpu()
    assert float((have.double() - want).norm()) <= 4e-3 * float(want.norm())


@pytest.mark.parametrize("rank", [0, 4])
def test_weight(rank: int) -> None:
    layer = random_layer("m2", 21, 45, rank=rank)
    weight = ResidentLinear(layer.to(ON), None).weight.cpu()
    assert torch.equal(weight, layer.approximation().bfloat16())


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer("m2", rank=4)
    assert not resident.takes(layer, torch.bfloat16)  # on the CPU
    monkeypatch.setattr(resident, "available", lambda device: True)
    assert resident.takes(layer, torch.bfloat16)
    assert not resident.takes(layer, torch.float16)
    assert not resident.takes(layer, torch.float32)
    assert not resident.takes(random_layer("free"), torch.bfloat16)
    assert not resident.takes(random_layer("m1", rank=33), torch.bfloat16)
