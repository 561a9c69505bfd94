"""The expanded path: an exact FP8 matrix, and what is left of the scales for each row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dequantized import CODES, Dense, lorc_of, weight_of
from packed_layers import random_layer
from torch import Tensor

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.numerics import fp8
from zqfp_convert.numerics.scales import Kind
from zqfp_convert.runtime import expanded


def expand(layer: PackedLayer) -> Tensor:
    """The FP8 matrix of a layer, written over garbage; float8_e4m3fn `[N', K']`."""
    shape = (layer.rows + -layer.rows % 16, layer.columns + -layer.columns % 16)
    out = torch.full(shape, 0x5A, dtype=torch.uint8)
    expanded.expand(layer.packed, layer.scale, layer.group_size, out)
    return out.view(torch.float8_e4m3fn)


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


def assert_exact(layer: PackedLayer) -> None:
    matrix = expand(layer).float()
    factor = expanded.row_factor(layer.scale, layer.row_scale)
    have = matrix[: layer.rows, : layer.columns] * factor[:, None]
    want = weight_of(layer.tensors(), layer.name, layer.columns, layer.group_size).float()
    assert torch.equal(bits(have), bits(want))
    assert torch.equal(bits(have), bits(layer.dequantize()))
    assert not matrix[layer.rows :].view(torch.int32).any()
    assert not matrix[:, layer.columns :].contiguous().view(torch.int32).any()


def test_every_code_at_every_shift() -> None:
    table = expanded.shift_table()
    assert table.shape == (12, 16)
    assert table.dtype == torch.uint8
    for below in range(12):
        for code in range(16):
            value = float(table[below, code].view(torch.float8_e4m3fn).float())
            assert value == float(CODES[code]) * 2.0 ** (6 - below)
            assert value == 0 or 2.0**-6 <= abs(value) <= 448  # a normal number, or zero


@pytest.mark.parametrize("kind", ["m1", "m2"])
@pytest.mark.parametrize("group_size", [1, 5, 32, 64, 256])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (1, 2), (3, 5), (16, 16), (17, 33), (48, 64), (31, 255)]
)
def test_expansion_is_exact(kind: Kind, rows: int, columns: int, group_size: int) -> None:
    assert_exact(random_layer(kind, rows, columns, group_size, seed=rows + columns))


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


@pytest.fixture
def scaled_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch._scaled_mm` with row-wise scales, computed in float64 where torch has none here."""
    a = torch.ones(16, 16).to(torch.float8_e4m3fn)
    one = torch.ones(16, 1)
    try:
        torch._scaled_mm(a, a.t(), scale_a=one, scale_b=one.t(), out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError):
        monkeypatch.setattr(torch, "_scaled_mm", emulated)


def emulated(
    a: Tensor,
    b: Tensor,
    *,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    assert a.dtype == b.dtype == torch.float8_e4m3fn
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    assert all(extent % 16 == 0 for extent in (*a.shape, *b.shape))
    assert scale_a.shape == (a.shape[0], 1)
    assert scale_b.shape == (1, b.shape[1])
    assert scale_a.dtype == scale_b.dtype == torch.float32
    product = a.float().double() @ b.float().double()
    return (product * scale_a.double() * scale_b.double()).to(out_dtype)


def multiply(layer: PackedLayer, x: Tensor, bias: Tensor | None, offset: Tensor | None) -> Tensor:
    factor = expanded.row_factor(layer.scale, layer.row_scale)
    factor = torch.nn.functional.pad(factor, (0, -layer.rows % 16), value=1.0)
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


def test_activation_codes_are_those_of_the_reference() -> None:
    x = torch.randn(5, 45).bfloat16()
    codes, scale = fp8.quantize(x)
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(codes.float() * scale, fp8.simulate(x.float()))
