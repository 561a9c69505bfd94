"""One packed layer: from codes and scales to tensors and back, and the rules it is held to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from dequantized import lorc_of, weight_of
from waits import Waits

from zqfp_convert.checkpoint.packed import PackedLayer, pack
from zqfp_convert.errors import CheckpointError
from zqfp_convert.numerics import codebook, scales
from zqfp_convert.numerics.scales import Kind

ROUNDINGS: dict[Kind, str] = {"free": "nearest", "m1": "ceil", "m2": "floor"}


def quantized(
    kind: Kind,
    rows: int = 5,
    columns: int = 77,
    group_size: int = 32,
    rank: int = 0,
    books: tuple[codebook.Codebook, ...] = (codebook.E2M1,),
) -> PackedLayer:
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator)
    rounding = "search" if len(books) > 1 else ROUNDINGS[kind]
    chosen = scales.choose(weight, kind, rounding, group_size, books=books)
    codes = scales.quantize(weight, chosen)
    chosen = scales.canonical(codes, chosen)
    factors = None
    if rank:
        A = torch.randn(rank, columns, generator=generator).to(torch.float8_e4m3fn)
        B = torch.randn(rows, rank, generator=generator).to(torch.float8_e4m3fn)
        factors = (A, B, torch.rand(rank, generator=generator))
    layer = pack("model.layers.0.up", codes, chosen, factors)
    layer.check()
    assert torch.equal(layer.codes(), codes)
    assert torch.equal(layer.dequantize(), scales.dequantize(codes, chosen))
    return layer


@pytest.mark.parametrize("kind", ["free", "m1", "m2"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 77), (16, 64), (3, 33), (2, 200)])
@pytest.mark.parametrize("group_size", [8, 32, 64, 256])
@pytest.mark.parametrize("books", [(codebook.E2M1,), codebook.PAIR], ids=["e2m1", "pair"])
def test_there_and_back(
    kind: Kind, rows: int, columns: int, group_size: int, books: tuple[codebook.Codebook, ...]
) -> None:
    if kind == "free" and len(books) > 1:
        pytest.skip("free scales have one codebook")
    layer = quantized(kind, rows, columns, group_size, books=books)
    want = weight_of(layer.tensors(), layer.name, columns, group_size, books)
    assert torch.equal(layer.dequantize().double(), want)
    assert layer.rows == rows
    assert layer.rank == 0
    assert layer.lorc_product() is None


def test_tensors() -> None:
    layer = quantized("m2", rank=3)
    shapes = {
        name.removeprefix("model.layers.0.up"): (tensor.dtype, tuple(tensor.shape))
        for name, tensor in layer.tensors().items()
    }
    assert shapes == {
        ".weight_packed": (torch.uint8, (5, 39)),
        ".weight_scale": (torch.uint8, (5, 3)),
        ".weight_row_scale": (torch.bfloat16, (5,)),
        ".lorc_A": (torch.float8_e4m3fn, (3, 77)),
        ".lorc_B": (torch.float8_e4m3fn, (5, 3)),
        ".lorc_scale": (torch.float32, (3,)),
    }
    assert quantized("m1").tensors().keys() == {
        "model.layers.0.up.weight_packed", "model.layers.0.up.weight_scale"
    }  # fmt: skip
    free = quantized("free").tensors()["model.layers.0.up.weight_scale"]
    assert free.dtype == torch.bfloat16


def test_bits_are_counted_from_the_bytes() -> None:
    layer = quantized("m2", 16, 1024, 128)
    assert layer.bits == 4 + 8 / 128 + 16 / 1024
    assert quantized("m1", 16, 1024, 128).bits == 4 + 8 / 128
    assert quantized("free", 16, 1024, 128).bits == 4 + 16 / 128
    assert quantized("m2", 16, 1024, 128, rank=8).bits == pytest.approx(
        4 + 8 / 128 + 16 / 1024 + 8 * (8 * (16 + 1024) + 4 * 8) / (16 * 1024)
    )


def test_lorc_product() -> None:
    layer = quantized("m2", rank=3)
    factors = lorc_of(layer.tensors(), layer.name)
    assert factors is not None
    want = (factors[1] @ factors[0]).float()
    torch.testing.assert_close(layer.lorc_product(), want, rtol=1e-5, atol=1e-5)
    bare = dataclasses.replace(layer, lorc_scale=None)
    assert not torch.allclose(bare.lorc_product(), layer.lorc_product())


def broken(layer: PackedLayer, **tensors: torch.Tensor) -> str:
    with pytest.raises(CheckpointError) as raised:
        dataclasses.replace(layer, **tensors).check()
    assert raised.value.where == layer.name
    return raised.value.rule


def changed(tensor: torch.Tensor, place: tuple[int, ...], value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def test_the_first_of_several_broken_rules_is_told() -> None:
    layer = quantized("m2", rank=2)
    assert layer.row_scale is not None
    assert layer.lorc_scale is not None
    factors = changed(layer.lorc_scale, (0,), float("nan"))
    assert broken(layer, lorc_scale=factors, packed=layer.packed | 0x10) == "padding-nibble"
    negative = changed(layer.row_scale, (3,), -1.0)
    assert broken(layer, lorc_scale=factors, scale=layer.scale - 1, row_scale=negative) == (
        "row-scale"
    )
    wide = changed(layer.scale, (1, int(layer.scale[1].argmin())), 127 - 13)
    with pytest.raises(CheckpointError, match="span 13") as raised:
        dataclasses.replace(layer, scale=wide, lorc_scale=factors).check()
    assert raised.value.rule == "span"


@pytest.mark.parametrize("kind", ["free", "m1", "m2"])
def test_a_layer_is_checked_with_one_wait(kind: Kind) -> None:
    layer = quantized(kind, rank=3)
    layer.check()  # now tables are made
    with Waits() as waits:
        layer.check()
    assert waits.calls == ["tolist"]


def test_broken_rules() -> None:
    m1, m2, free = quantized("m1"), quantized("m2", rank=2), quantized("free")
    top = int(m1.scale[1].max())
    assert broken(m1, scale=changed(m1.scale, (0, 0), 255)) == "scale-forbidden"
    assert broken(m1, scale=changed(m1.scale, (1, 2), top - 12)) == "span"
    dataclasses.replace(m1, scale=changed(m1.scale, (1, 2), top - 11)).check()
    assert broken(m2, scale=changed(m2.scale, (0, 0), 128)) == "row-maximum"
    assert broken(m2, scale=m2.scale - 1) == "row-maximum"
    for value in (0.0, -1.0, float("nan"), float("inf")):
        assert m2.row_scale is not None
        assert broken(m2, row_scale=changed(m2.row_scale, (3,), value)) == "row-scale"
        assert broken(free, scale=changed(free.scale, (0, 0), value)) == "scale-forbidden"
    assert broken(m2, packed=m2.packed | 0x10) == "padding-nibble"
    assert m2.lorc_scale is not None
    assert broken(m2, lorc_scale=changed(m2.lorc_scale, (0,), float("nan"))) == "lorc-value"
    offset = torch.full((77,), float("inf"), dtype=torch.bfloat16)
    assert broken(m2, input_offset=offset) == "offset-value"
    pair = quantized("m2", books=codebook.PAIR)
    assert pair.choice is not None
    assert broken(pair, choice=pair.choice | 0x80) == "codebook-choice"
    nothing = pair.packed.clone()
    nothing[0, 16:32] = 0
    top = changed(pair.scale, (0, 1), 127)
    others = int(pair.choice[0, 1]) & 0xFE
    second = changed(pair.choice, (0, 1), others | 1)
    assert broken(pair, packed=nothing, scale=top, choice=second) == "codebook-choice"
    first = changed(pair.choice, (0, 1), others)
    dataclasses.replace(pair, packed=nothing, scale=top, choice=first).check()
    empty = m2.packed.clone()
    empty[0, :16] = 0
    assert broken(m2, packed=empty, scale=changed(m2.scale, (0, 0), 125)) == "zero-group"
