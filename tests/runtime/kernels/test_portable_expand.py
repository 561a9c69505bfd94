"""The expansion kernel writes the bytes of `expanded.expand`."""

from __future__ import annotations

import pytest
import torch
from dequantized import weight_of
from packed_layers import random_layer

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.numerics import codebook
from zqfp_convert.numerics.scales import Kind
from zqfp_convert.runtime import expanded
from zqfp_convert.runtime.kernels.portable import expand, layout


def assert_same(layer: PackedLayer, shape: tuple[int, int], device: torch.device) -> None:
    group_size = layer.group_size
    want = torch.full(shape, 0x5A, dtype=torch.uint8)
    books, choice = layer.books, layer.choice
    expanded.expand(layer.packed, layer.scale, group_size, want, books, choice)
    weights, shifts = layout.arrange(layer.packed, layer.scale, group_size, layer.columns, choice)
    twin = torch.full(shape, 0x5A, dtype=torch.uint8)
    expand.expand_twin(weights, shifts, group_size, twin, books)
    assert torch.equal(twin, want)
    have = torch.full(shape, 0x5A, dtype=torch.uint8, device=device)
    expand.expand(weights.to(device), shifts.to(device), group_size, have, books)
    assert torch.equal(have.cpu(), want)
    matrix = have.cpu().view(torch.float8_e4m3fn).double()[: layer.rows, : layer.columns]
    factor = expanded.row_factor(layer.scale, layer.row_scale)
    truth = weight_of(layer.tensors(), layer.name, layer.columns, group_size, books)
    assert torch.equal(matrix * factor.double()[:, None], truth)


@pytest.mark.parametrize("kind", ["m1", "m2"])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 192, 256, 384, 0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (65, 129), (5, 600)])
def test_expansion(
    kind: Kind, rows: int, columns: int, group_size: int, device: torch.device
) -> None:
    layer = random_layer(kind, rows, columns, group_size or columns, seed=rows + columns)
    assert_same(layer, (rows + -rows % 16, columns + -columns % 16), device)


@pytest.mark.parametrize("books", [codebook.PAIR[:1], codebook.PAIR], ids=["one", "pair"])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 0])
def test_other_codebooks(
    books: tuple[codebook.Codebook, ...], group_size: int, device: torch.device
) -> None:
    layer = random_layer("m2", 65, 300, group_size or 300, books=books)
    assert_same(layer, (80, 304), device)


@pytest.mark.parametrize("shape", [(48, 80), (80, 256), (128, 272), (33, 400)])
def test_larger_than_it_needs(shape: tuple[int, int], device: torch.device) -> None:
    assert_same(random_layer("m2", 33, 70, 32), shape, device)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_byte_at_every_shift(group_size: int, device: torch.device) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    weights = torch.cat([every[:64], every]).repeat(12, 1)  # [12, 320]: 5 blocks
    groups = 640 // group_size
    shifts = torch.arange(12, dtype=torch.uint8)[:, None].repeat(1, groups)
    shifts[:, : groups // 5] = 0  # a row's largest exponent is somewhere
    packed, below = layout.restore(weights, shifts, group_size, 640)
    layer = PackedLayer(
        "layer", "m2", group_size, 640, packed, 127 - below, torch.ones(12).bfloat16()
    )
    assert_same(layer, (16, 640), device)
