"""The expanded path: an exact FP8 matrix, and what is left of the scales for each row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dequantized import Dense, lorc_of, weight_of
from packed_layers import random_layer
from torch import Tensor

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.numerics import codebook, fp8
from zqfp_convert.numerics.scales import Kind
from zqfp_convert.runtime import expanded


def expand(layer: PackedLayer) -> Tensor:
    """The FP8 matrix of a layer, written over garbage; float8_e4m3fn `[N', K']`."""
    shape = (layer.rows + -layer.rows % 16, layer.columns + -layer.columns % 16)
    out = torch.full(shape, 0x5A, dtype=torch.uint8)
    expanded.expand(layer.packed, layer.scale, layer.group_size, out, layer.books, layer.choice)
    return out.view(torch.float8_e4m3fn)


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


def assert_exact(layer: PackedLayer) -> None:
    matrix = expand(layer).float()
    factor = expanded.row_factor(layer.scale, layer.row_scale)
    have = matrix[: layer.rows, : layer.columns] * factor[:, None]
    size = layer.columns, layer.group_size
    want = weight_of(layer.tensors(), layer.name, *size, layer.books).float()
    assert torch.equal(bits(have), bits(want))
    assert torch.equal(bits(have), bits(layer.dequantize()))
    assert not matrix[layer.rows :].view(torch.int32).any()
    assert not matrix[:, layer.columns :].contiguous().view(torch.int32).any()


@pytest.mark.parametrize("book", [codebook.E2M1, *codebook.PAIR])
def test_every_code_at_every_shift(book: codebook.Codebook) -> None:
    table = expanded.shift_table(book=book)
    assert table.shape == (12, 16)
    assert table.dtype == torch.uint8
    for below in range(12):
        for code in range(16):
            value = float(table[below, code].view(torch.float8_e4m3fn).float())
            assert value == (*book, *(-v for v in book))[code] * 2.0 ** (6 - below)
            assert value == 0 or 2.0**-6 <= abs(value) <= 448  # a normal number, or zero


@pytest.mark.parametrize("kind", ["m1", "m2"])
@pytest.mark.parametrize("group_size", [1, 5, 32, 64, 256])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (1, 2), (3, 5), (16, 16), (17, 33), (48, 64), (31, 255)]
)
@pytest.mark.parametrize(
    "books", [(codebook.E2M1,), codebook.PAIR[1:], codebook.PAIR], ids=["e2m1", "other", "pair"]
)
def test_expansion_is_exact(
    kind: Kind,
    rows: int,
    columns: int,
    group_size: int,
    books: tuple[codebook.Codebook, ...],
) -> None:
    seed = rows + columns
    assert_exact(random_layer(kind, rows, columns, group_size, seed=seed, books=books))


@pytest.mark.parametrize("span", range(12))
def test_every_span(span: int) -> None:
    assert_exact(random_layer("m2", 40, 72, 4, span=span))
    assert_exact(random_layer("m1", 40, 72, 4, span=span))


def test_groups_of_a_row() -> None:
    assert_exact(random_layer("m2", 5, 33, 33))


@pytest.mark.parametrize("exponent", [-133, -126, -100, 100, 118])
def test_extreme_row_scales(exponent: int) -> None:
    layer = random_layer("m2")
    assert layer.row_scale is not None
    layer.row_scale[:] = torch.tensor(2.0**exponent).bfloat16()
    assert_exact(layer)


@pytest.mark.parametrize("top", [11, 12, 240])
def test_extreme_exponents(top: int) -> None:
    layer = random_layer("m1")
    largest = layer.scale.amax(1, keepdim=True)
    layer.scale.copy_(layer.scale.int() - largest.int() + top)
    assert_exact(layer)


def test_in_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expanded, "CHUNK", 200)
    assert_exact(random_layer("m2", 37, 72))
    monkeypatch.setattr(expanded, "CHUNK", 1)
    assert_exact(random_layer("m2", 5, 72))


def multiply(layer: PackedLayer, x: Tensor, bias: Tensor | None, offset: Tensor | None) -> Tensor:
    factor = expanded.matrix_factor(layer.scale, layer.row_scale)
    lorc = None
    if layer.lorc_A is not None and layer.lorc_B is not None:
        lorc = (layer.lorc_A, layer.lorc_B, layer.lorc_scale)
    return expanded.linear(x, expand(layer), layer.rows, factor, lorc, bias, offset)


@pytest.mark.usefixtures("scaled_mm")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (16,), (3, 7), (17,), ()])
@pytest.mark.parametrize("extras", ["", "bias", "lorc", "offset", "bias lorc offset"])
def test_linear(dtype: torch.dtype, shape: tuple[int, ...], extras: str) -> None:
    layer = random_layer("m2", 21, 45, rank=4 if "lorc" in extras else 0, span=4)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(*shape, 45, generator=generator).to(dtype)
    bias = torch.randn(21, generator=generator) if "bias" in extras else None
    offset = torch.randn(45, generator=generator).bfloat16() if "offset" in extras else None
    have = multiply(layer, x, bias, offset)
    weight = weight_of(layer.tensors(), layer.name, 45, 32)
    truth = Dense(weight, lorc_of(layer.tensors(), layer.name), bias)
    want = truth(x.float() if offset is None else x.float() - offset.float())
    assert have.dtype == dtype
    assert have.shape == (*shape, 21)
    assert float((have.double() - want).norm()) < 4e-3 * float(want.norm())


@pytest.mark.usefixtures("scaled_mm")
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    layer = random_layer("m2", 21, 45)
    y = multiply(layer, torch.zeros(*shape, 45, dtype=torch.bfloat16), None, None)
    assert y.shape == (*shape, 21)


@pytest.mark.parametrize(
    ("kind", "capability", "want"),
    [
        ("cuda", (9, 0), True),
        ("cuda", (8, 9), True),
        ("cuda", (8, 6), False),
        ("cpu", (9, 0), False),
    ],
)
def test_where_it_is_available(
    kind: str, capability: tuple[int, int], want: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell: Callable[[object], tuple[int, int]] = lambda device: capability  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_capability", tell)
    assert expanded.available(torch.device(kind)) is want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 1, 20])
@pytest.mark.parametrize("biased", [False, True])
def test_what_is_added_has_float32_precision(dtype: torch.dtype, rank: int, biased: bool) -> None:
    y = torch.randn(9, 21).bfloat16()
    z = torch.randn(9, rank) if rank else None
    B = torch.randn(21, rank).to(torch.float8_e4m3fn) if rank else None
    bias = torch.randn(21) if biased else None
    want = y.double()
    if z is not None and B is not None:
        want = want + z.double() @ B.float().double().t()
    if bias is not None:
        want = want + bias.double()
    have = expanded.finish(y.clone(), z, B, bias, dtype)
    assert have.dtype == dtype
    assert have.is_contiguous()
    half_ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    size = max(1.0, rank**0.5) * 8
    assert bool(((have.double() - want).abs() <= 1.01 * half_ulp * want.abs() + 1e-5 * size).all())


def test_rows_of_a_larger_product() -> None:
    """`finish` may overwrite what it is given, and gives whole rows."""
    larger = torch.randn(16, 32).bfloat16()
    bias = torch.randn(21)
    want = (larger[:9, :21].float() + bias).bfloat16()
    have = expanded.finish(larger[:9, :21], None, None, bias, torch.bfloat16)
    assert have.is_contiguous()
    torch.testing.assert_close(have, want, rtol=2**-7, atol=1e-3)


def test_the_shape_of_the_matrix() -> None:
    assert expanded.matrix_shape(1, 1) == (16, 128)
    assert expanded.matrix_shape(16, 128) == (16, 128)
    assert expanded.matrix_shape(17, 4097) == (32, 4224)


def test_activation_codes_are_those_of_the_reference() -> None:
    x = torch.randn(5, 45).bfloat16()
    codes, scale = fp8.quantize(x)
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(codes.float() * scale, fp8.simulate(x.float()))
