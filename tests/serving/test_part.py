from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from packed_layers import random_layer

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.numerics import codebook
from zqfp_convert.numerics.scales import Kind
from zqfp_convert.serving import factors, part


def whole(kind: Kind = "m2", columns: int = 192, group_size: int = 32) -> PackedLayer:
    books = (codebook.E2M1,) if kind == "free" else codebook.PAIR
    layer = random_layer(kind, 40, columns, group_size, rank=3, books=books)
    return replace(layer, input_offset=torch.randn(columns).bfloat16())


@pytest.mark.parametrize("kind", ["m1", "m2", "free"])
@pytest.mark.parametrize(("first", "count"), [(0, 20), (20, 20), (13, 7)])
def test_rows(kind: Kind, first: int, count: int) -> None:
    layer = whole(kind)
    some = part.of_rows(layer, first, count)
    here = slice(first, first + count)
    assert torch.equal(some.dequantize(), layer.dequantize()[here])
    assert torch.equal(some.lorc_product(), layer.lorc_product()[here])
    assert some.rows == count
    assert some.input_offset is layer.input_offset


@pytest.mark.parametrize("kind", ["m1", "m2", "free"])
@pytest.mark.parametrize(
    ("columns", "group_size", "first", "count"),
    [
        (192, 32, 96, 96),
        (192, 32, 128, 64),
        (192, 192, 96, 96),
        (108, 32, 64, 44),
        (90, 128, 0, 46),
    ],
)
def test_columns(kind: Kind, columns: int, group_size: int, first: int, count: int) -> None:
    layer = whole(kind, columns, group_size)
    some = part.of_columns(layer, first, count)
    here = slice(first, first + count)
    assert torch.equal(some.dequantize(), layer.dequantize()[:, here])
    assert torch.equal(some.lorc_product(), layer.lorc_product()[:, here])
    assert torch.equal(some.input_offset, layer.input_offset[here])
    assert some.columns == count


@pytest.mark.parametrize("scaled", [True, False])
def test_factors_of_a_fused_linear(scaled: bool) -> None:
    sizes = [24, 8, 16]
    layers = [random_layer("m2", rows, 72, rank=3, seed=rows) for rows in sizes]
    A = torch.stack([layer.lorc_A for layer in layers])
    B = torch.cat([layer.lorc_B for layer in layers])
    scale = torch.stack([layer.lorc_scale for layer in layers]) if scaled else None
    one = PackedLayer("", "m2", 32, 72, B.view(torch.uint8), B.view(torch.uint8))
    a, b, s = factors.stack(A, B, scale, sizes)
    assert a.shape == (9, 72)
    assert b.shape == (48, 9)
    parts = layers if scaled else [replace(layer, lorc_scale=None) for layer in layers]
    wanted = torch.cat([layer.lorc_product() for layer in parts])
    found = replace(one, lorc_A=a, lorc_B=b, lorc_scale=s).lorc_product()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_factors_of_a_linear_that_is_fused_on_disk_are_shared() -> None:
    layer = random_layer("m2", 48, 72, rank=3)
    A, scale = layer.lorc_A.expand(3, 3, 72), layer.lorc_scale.expand(3, 3)
    a, b, s = factors.stack(A, layer.lorc_B, scale, [24, 8, 16])
    for found, wanted in ((a, layer.lorc_A), (b, layer.lorc_B), (s, layer.lorc_scale)):
        assert torch.equal(found.float(), wanted.float())


def test_a_part_in_memory_of_its_own() -> None:
    layer = whole()
    some = part.of_columns(layer, 96, 96)
    copy = part.apart(some, torch.device("cpu"))
    assert torch.equal(copy.dequantize(), some.dequantize())
    for name, tensor in copy.tensors().items():
        assert tensor.is_contiguous(), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
