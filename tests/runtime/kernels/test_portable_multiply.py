"""The fused multiplication against its twin and against float64 from the bytes on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from dequantized import lorc_of, seen, weight_of
from packed_layers import random_layer
from torch import Tensor

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.numerics import codebook
from zqfp_convert.numerics.scales import Kind
from zqfp_convert.runtime import expanded, reference
from zqfp_convert.runtime.kernels.portable import layout, multiply, quantize
from zqfp_convert.runtime.kernels.portable.quantize import Quantized
from zqfp_convert.runtime.kernels.portable.tiles import Tiles

ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SUBNORMAL = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}
SMALL = Tiles(rows=16, tokens=16, splits=1, band=2, warps=4, stages=2)


class Truth(NamedTuple):
    """A product in float64, and how far float32 sums may be off for each relative error."""

    y: Tensor
    magnitude: Tensor


def truth(layer: PackedLayer, x: Tensor, bias: Tensor | None) -> Truth:
    """`[M, N]` from the bytes on disk, sharing no code with the package."""
    size = layer.columns, layer.group_size
    weight = weight_of(layer.tensors(), layer.name, *size, layer.books)
    offset = layer.input_offset
    inputs = seen(x.float() if offset is None else x.float() - offset.float()).double()
    y, magnitude = inputs @ weight.t(), inputs.abs() @ weight.abs().t()
    lorc = lorc_of(layer.tensors(), layer.name)
    if lorc is not None:
        A, B = lorc
        y = y + inputs @ A.t() @ B.t()
        magnitude = magnitude + inputs.abs() @ A.abs().t() @ B.abs().t()
    if bias is not None:
        y, magnitude = y + bias.double(), magnitude + bias.double().abs()
    return Truth(y, magnitude)


def run(
    layer: PackedLayer,
    x: Tensor,
    device: torch.device,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    chosen: Tiles | None = None,
    quantizer: Callable[..., Quantized] = quantize.quantize_twin,
) -> tuple[Tensor, Tensor]:
    """The results of the kernel and of its twin, both on the CPU.

    The twin of the quantization is the default because its bytes are the kernel's, only sooner.
    """
    size, columns = layer.group_size, layer.columns
    weights, shifts = layout.arrange(layer.packed, layer.scale, size, columns, layer.choice)
    books = layer.books
    factor = expanded.row_factor(layer.scale, layer.row_scale)
    inner = None if layer.lorc_A is None else (layer.lorc_A, layer.lorc_scale)

    def move(*tensors: Tensor | None) -> list[Tensor | None]:
        return [None if tensor is None else tensor.to(device) for tensor in tensors]

    if quantizer is quantize.quantize:
        x_there, offset, A, A_scale = move(x, layer.input_offset, layer.lorc_A, layer.lorc_scale)
        results = quantizer(x_there, offset, None if A is None else (A, A_scale))
        codes, scale, z = (None if t is None else t.cpu() for t in results)
    else:
        codes, scale, z = quantizer(x, layer.input_offset, inner)
    B = layer.lorc_B
    twin = multiply.multiply_twin(
        codes,
        scale,
        weights,
        shifts,
        size,
        factor,
        None if z is None else (B, z),
        bias,
        dtype,
        books,
    )
    codes, scale, weights, shifts, factor, B, z, bias = move(
        codes, scale, weights, shifts, factor, B, z, bias
    )
    lorc = None if z is None else (B, z)
    have = multiply.multiply(
        codes, scale, weights, shifts, size, factor, lorc, bias, dtype, chosen, books
    ).cpu()
    for y in (have, twin):
        assert y.dtype == dtype
        assert y.shape == (x.shape[0], layer.rows)
    return have, twin


def assert_right(
    layer: PackedLayer,
    x: Tensor,
    device: torch.device,
    summing: float,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    chosen: Tiles | None = None,
    quantizer: Callable[..., Quantized] = quantize.quantize_twin,
) -> Tensor:
    want = truth(layer, x, bias)
    have, twin = run(layer, x, device, bias, dtype, chosen, quantizer)
    limit = ROUNDING[dtype] * want.y.abs() + SUBNORMAL[dtype]
    assert bool(((have - want.y).abs() <= limit + summing * want.magnitude).all())
    assert bool(((twin - want.y).abs() <= limit + 2e-6 * want.magnitude).all())
    return have


@pytest.mark.parametrize("kind", ["m1", "m2"])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 192, 256, 384, 0])
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(17, 129, 5), (65, 600, 17)])
def test_group_sizes(
    kind: Kind,
    group_size: int,
    rows: int,
    columns: int,
    tokens: int,
    device: torch.device,
    summing: float,
) -> None:
    layer = random_layer(kind, rows, columns, group_size or columns, seed=group_size)
    assert_right(layer, torch.randn(tokens, columns), device, summing)


@pytest.mark.parametrize("books", [codebook.PAIR[1:], codebook.PAIR], ids=["one", "pair"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 0])
def test_other_codebooks(
    books: tuple[codebook.Codebook, ...],
    group_size: int,
    device: torch.device,
    summing: float,
) -> None:
    layer = random_layer("m2", 65, 300, group_size or 300, 3, books=books)
    assert_right(layer, torch.randn(17, 300), device, summing, torch.randn(65))


@pytest.mark.parametrize("rows", [1, 17, 65])
@pytest.mark.parametrize("columns", [1, 33, 129, 300])
@pytest.mark.parametrize("tokens", [1, 5, 17, 70])
def test_odd_shapes(
    rows: int, columns: int, tokens: int, device: torch.device, summing: float
) -> None:
    layer = random_layer("m2", rows, columns, 32, rank=3, seed=rows + columns)
    assert_right(layer, torch.randn(tokens, columns), device, summing, torch.randn(rows))


@pytest.mark.parametrize("rank", [0, 1, 8, 20])
@pytest.mark.parametrize("extras", ["", "bias", "bias offset"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extras(
    rank: int, extras: str, dtype: torch.dtype, device: torch.device, summing: float
) -> None:
    layer = random_layer("m2", 65, 300, 64, rank)
    if "offset" in extras:
        layer = dataclasses.replace(layer, input_offset=torch.randn(300).bfloat16())
    bias = torch.randn(65).to(dtype) if "bias" in extras else None
    x = torch.randn(5, 300).to(dtype)
    # float16 ends at 65504: keep the largest rows below
    assert layer.row_scale is not None
    layer.row_scale.mul_(2.0**-8)
    have = assert_right(layer, x, device, summing, bias, dtype)
    factors = layer.lorc_factors()
    official = reference.linear(x, layer.dequantize(), factors, bias, layer.input_offset)
    assert float((have.double() - official).norm()) <= 8e-3 * float(official.double().norm())


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("tokens", [1, 17])
def test_with_the_kernel_that_quantizes(
    rank: int, tokens: int, device: torch.device, summing: float
) -> None:
    layer = random_layer("m2", 65, 300, 64, rank)
    layer = dataclasses.replace(layer, input_offset=torch.randn(300).bfloat16())
    x, bias = torch.randn(tokens, 300).bfloat16(), torch.randn(65)
    assert_right(layer, x, device, summing, bias, quantizer=quantize.quantize)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_factors_of_either_dtype(dtype: torch.dtype, device: torch.device, summing: float) -> None:
    layer = random_layer("m2", 33, 160, 32, rank=8)
    assert layer.lorc_A is not None
    assert layer.lorc_B is not None
    layer = dataclasses.replace(
        layer,
        lorc_A=layer.lorc_A.to(dtype),
        lorc_B=(layer.lorc_B.float() * 1.01).to(dtype),
        lorc_scale=layer.lorc_scale if dtype == torch.float8_e4m3fn else None,
    )
    assert_right(layer, torch.randn(20, 160), device, summing)


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize("group_size", [32, 256])
def test_splits(splits: int, group_size: int, device: torch.device, summing: float) -> None:
    """Also more splits than there are blocks; the same bits at every call."""
    layer = random_layer("m2", 65, 700, group_size, rank=3)
    x, bias = torch.randn(17, 700), torch.randn(65)
    chosen = SMALL._replace(splits=splits, rows=64, tokens=32)
    have = assert_right(layer, x, device, summing, bias, chosen=chosen)
    again, _ = run(layer, x, device, bias, torch.float32, chosen)
    assert torch.equal(have.view(torch.int32), again.view(torch.int32))


@pytest.mark.parametrize("band", [1, 2, 3])
def test_every_tile_is_visited(band: int, device: torch.device, summing: float) -> None:
    layer = random_layer("m2", 100, 130, 32)
    chosen = SMALL._replace(rows=64, band=band)
    assert_right(layer, torch.randn(70, 130), device, summing, chosen=chosen)


@pytest.mark.parametrize("tokens", [1, 20, 40, 130])
def test_tiles_that_are_chosen(tokens: int, device: torch.device, summing: float) -> None:
    layer = random_layer("m2", 140, 1200, 128, rank=8)
    assert_right(layer, torch.randn(tokens, 1200), device, summing)


@pytest.mark.parametrize("kind", ["m1", "m2"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_huge_group_beside_tiny_ones(
    kind: Kind, group_size: int, device: torch.device, summing: float
) -> None:
    layer = random_layer(kind, 33, 512, group_size)
    below = torch.full_like(layer.scale, 11)
    groups = layer.scale.shape[1]
    below[torch.arange(33), torch.arange(33) % groups] = 0
    layer.scale.copy_(layer.scale.amax(1, keepdim=True) - below)
    x = torch.randn(5, 512)
    assert_right(layer, x, device, summing)
    # Only tiny groups see an input: they are exact by themselves.
    alone = torch.zeros(groups, 512)
    for group in range(groups):
        part = slice(group * group_size, (group + 1) * group_size)
        alone[group, part] = torch.randn(group_size)
    assert_right(layer, alone, device, summing)


def test_token_scales_over_six_decades(device: torch.device, summing: float) -> None:
    layer = random_layer("m2", 33, 300, 32, rank=4)
    x = torch.randn(19, 300) * 10 ** torch.linspace(-3, 3, 19)[:, None]
    have = assert_right(layer, x, device, summing)
    alone, _ = run(layer, x[:1], device, dtype=torch.float32)
    torch.testing.assert_close(have[:1], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


def test_rows_and_tokens_of_zeros(device: torch.device, summing: float) -> None:
    layer = random_layer("m2", 33, 300, 32, rank=4)
    layer.packed[5] = 0
    layer.scale[5] = 127
    x, bias = torch.randn(7, 300), torch.randn(33)
    x[2] = 0
    have = assert_right(layer, x, device, summing, bias)
    assert torch.equal(have[2], bias)
    plain = dataclasses.replace(layer, lorc_A=None, lorc_B=None, lorc_scale=None)
    have = assert_right(plain, x, device, summing, bias)
    assert torch.equal(have[:, 5], bias[5].expand(7))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, interpreting
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_not_a_number_and_infinity(
    rank: int, splits: int, dtype: torch.dtype, device: torch.device
) -> None:
    layer = random_layer("m2", 33, 300, 32, rank)
    x = torch.randn(6, 300).to(dtype)
    clean, _ = run(layer, x, device, dtype=dtype, chosen=SMALL._replace(splits=splits))
    x[1, 3], x[2, 4], x[3, 299] = float("nan"), float("inf"), float("-inf")
    have, twin = run(layer, x, device, dtype=dtype, chosen=SMALL._replace(splits=splits))
    for y in (have, twin):
        assert y[1:4].isnan().all()
    assert torch.equal(have[[0, 4, 5]], clean[[0, 4, 5]])


@pytest.mark.parametrize("exponent", [-120, 60])
def test_extreme_row_scales(exponent: int, device: torch.device, summing: float) -> None:
    layer = random_layer("m2", 17, 160, 32)
    assert layer.row_scale is not None
    layer.row_scale[:] = torch.tensor(2.0**exponent).bfloat16()
    assert_right(layer, torch.randn(5, 160), device, summing)


def test_no_tokens(device: torch.device) -> None:
    layer = random_layer("m2", 33, 300, 32)
    have, _ = run(layer, torch.zeros(0, 300), device)
    assert have.shape == (0, 33)
