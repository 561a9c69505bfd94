"""The quantization kernel gives the bytes of `numerics.fp8.quantize`, and its low-rank product."""

from __future__ import annotations

import pytest
import torch
from dequantized import seen
from torch import Tensor

from zqfp_convert.numerics import fp8
from zqfp_convert.runtime.kernels.portable import layout, quantize
from zqfp_convert.runtime.kernels.portable.quantize import Quantized


def bits(codes: Tensor) -> Tensor:
    """The bytes, but for the sign of NaN, which is the processor's choice."""
    byte = codes.view(torch.uint8)
    return torch.where(byte & 0x7F == 0x7F, 0x7F, byte)


def run(
    x: Tensor,
    device: torch.device,
    offset: Tensor | None = None,
    lorc: tuple[Tensor, Tensor | None] | None = None,
) -> Quantized:
    """The kernel's result on the CPU, held to the definition and to the twin."""
    there = None
    if lorc is not None:
        there = (lorc[0].to(device), None if lorc[1] is None else lorc[1].to(device))
    moved = None if offset is None else offset.to(device)
    codes, scale, z = quantize.quantize(x.to(device), moved, there)
    have = Quantized(codes.cpu(), scale.cpu(), None if z is None else z.cpu())
    twin = quantize.quantize_twin(x, offset, lorc)
    shifted = x.float() if offset is None else x.float() - offset.float()
    want_codes, want_scale = fp8.quantize(shifted)
    columns = x.shape[1]
    assert have.codes.dtype == twin.codes.dtype == torch.float8_e4m3fn
    assert have.codes.shape == twin.codes.shape == (x.shape[0], layout.padded(columns))
    for result in (have, twin):
        assert torch.equal(bits(result.codes[:, :columns]), bits(want_codes))
        assert not result.codes[:, columns:].contiguous().view(torch.uint8).any()
        torch.testing.assert_close(result.scale, want_scale[:, 0], rtol=0, atol=0, equal_nan=True)
    return have


def random_lorc(
    rank: int, columns: int, dtype: torch.dtype, scaled: bool
) -> tuple[Tensor, Tensor | None]:
    A = torch.randn(rank, columns).to(dtype)
    return A, 0.1 + torch.rand(rank) if scaled else None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (5, 33), (17, 129), (2, 4096)])
@pytest.mark.parametrize("shifted", [False, True])
def test_bytes(
    dtype: torch.dtype, tokens: int, columns: int, shifted: bool, device: torch.device
) -> None:
    x = (torch.randn(tokens, columns) * 10 ** torch.linspace(-3, 3, tokens)[:, None]).to(dtype)
    offset = torch.randn(columns).bfloat16() if shifted else None
    run(x, device, offset)


def test_more_columns_than_a_tile(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "LARGEST_TILE", 256)
    x, offset = torch.randn(3, 1100).bfloat16(), torch.randn(1100).bfloat16()
    x[1, 1099] = 300.0
    x[2, 700] = float("nan")
    have = run(x, device, offset, random_lorc(3, 1100, torch.float8_e4m3fn, True))
    assert have.z is not None
    assert have.z[2].isnan().all()
    x[2, 700] = 0.0
    z = quantize.quantize_twin(x, offset, random_lorc(3, 1100, torch.bfloat16, False)).z
    assert z is not None
    assert z.isfinite().all()


def test_every_bfloat16_number(device: torch.device) -> None:
    every = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = every[every.isfinite()].float()
    fits = finite[finite.abs() <= 448]
    tokens = torch.nn.functional.pad(fits, (0, -fits.numel() % 4000)).view(-1, 4000)
    tokens = torch.nn.functional.pad(tokens, (0, 1), value=448.0)  # the scale is 1
    have = run(tokens.bfloat16(), device)
    assert torch.equal(have.scale, torch.ones_like(have.scale))


def test_every_tie_and_its_neighbours(device: torch.device) -> None:
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (values[1:] + values[:-1]) / 2
    infinity = torch.tensor(float("inf"))
    near = torch.cat([ties, torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity)])
    x = torch.cat([near, -near, values, -values])
    for scale in (1.0, 2.0**-40, 2.0**60):
        have = run(x[None] * scale, device)
        assert float(have.scale) == scale


def test_inexact_scales(device: torch.device) -> None:
    """Quotients right at ties, where an approximate division would show."""
    largest = 448 * (1 + torch.rand(64))
    odd = torch.arange(1, 32, 2) / 16.0
    x = (largest / 448)[:, None] * odd
    run(torch.cat([x, largest[:, None]], 1), device)


def test_tiny_and_huge_tokens(device: torch.device) -> None:
    x = torch.zeros(6, 40)
    x[1] = 2.0**-140
    x[2] = 2.0**-100
    x[3, 3] = -(2.0**-101)
    x[4] = 3e38
    x[5, 0], x[5, 1:] = 3e38, 1e-38
    have = run(x, device)
    assert float(have.scale[0]) == float(torch.tensor(2.0**-100) / 448)
    assert not have.codes[0].view(torch.uint8).any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, interpreting
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_not_a_number_and_infinity(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(6, 45).to(dtype)
    x[1, 3], x[2, 4], x[3, 0], x[4, 44] = (float(v) for v in ("nan", "inf", "-inf", "-nan"))
    have = run(x, device, None, random_lorc(3, 45, torch.float8_e4m3fn, True))
    decoded = have.codes[:, :45].float() * have.scale[:, None]
    assert have.z is not None
    for values in (decoded, have.z):
        assert values[1:5].isnan().all()
        assert values[[0, 5]].isfinite().all()


def test_rows_that_are_not_contiguous(device: torch.device) -> None:
    wide = torch.randn(7, 100)
    want = run(wide[:, 10:55].contiguous(), device)
    for x in (wide[:, 10:55], wide[:, 10:55].t().contiguous().t()):
        assert torch.equal(bits(run(x, device).codes), bits(want.codes))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize(("rank", "tokens", "columns"), [(20, 1, 33), (8, 5, 300), (1, 17, 129)])
def test_low_rank_product(
    dtype: torch.dtype,
    one_by_one: bool,
    rank: int,
    tokens: int,
    columns: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantize, "BY_TOKEN", 1 << 20 if one_by_one else 0)
    x, offset = torch.randn(tokens, columns).bfloat16(), torch.randn(columns).bfloat16()
    A, scale = random_lorc(rank, columns, dtype, scaled=rank != 8)
    have = run(x, device, offset, (A, scale)).z
    x_seen = seen(x.float() - offset.float()).double()
    factor = A.float().double() * (1.0 if scale is None else scale.double()[:, None])
    want, magnitude = x_seen @ factor.t(), x_seen.abs() @ factor.abs().t()
    assert have is not None
    assert have.dtype == torch.float32
    assert bool(((have - want).abs() <= 1e-5 * magnitude).all())


def test_many_tokens_with_factors(device: torch.device) -> None:
    lorc = random_lorc(20, 300, torch.float8_e4m3fn, True)
    x = torch.randn(70, 300).bfloat16()
    have, want = run(x, device, None, lorc).z, quantize.quantize_twin(x, None, lorc).z
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "tokens"), [(1, 1), (8, 5), (20, 70)])
def test_both_parts_of_a_product(rank: int, tokens: int, device: torch.device) -> None:
    A, scale = random_lorc(rank, 300, torch.float8_e4m3fn, True)
    assert scale is not None
    x = torch.randn(tokens, 300).bfloat16().to(device)
    lorc = A.to(device), scale.to(device)
    parts = quantize.quantize(x, None, lorc, parts=True).z
    whole = quantize.quantize_twin(x, None, lorc).z
    assert whole is not None
    assert parts is not None
    assert parts.dtype == torch.bfloat16
    high, low = parts[:, :rank], parts[:, rank:]
    assert float((high.float() - whole).abs().max()) > 0
    assert bool(((high.float() - whole).abs() <= 2.0**-8 * whole.abs()).all())
    torch.testing.assert_close(high.float() + low.float(), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 3])
def test_no_tokens(rank: int, device: torch.device) -> None:
    lorc = random_lorc(rank, 45, torch.bfloat16, False) if rank else None
    have = run(torch.randn(1, 45), device, None, lorc)
    empty = quantize.quantize(torch.zeros(0, 45, device=device))
    assert empty.codes.shape == (0, have.codes.shape[1])
    assert empty.scale.shape == (0,)
