"""The promise of the format: a row of codes and shifts is FP8 times one float32, exactly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import zqfp1_reader as reader
from safetensors.torch import load_file

VALID = Path(reader.__file__).parent / "vectors" / "valid"
E4M3 = torch.float8_e4m3fn
E2M1 = torch.tensor(reader.E2M1)


def test_the_tables_of_the_reader_are_torchs() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(
        torch.tensor(reader.E4M3), every_byte.view(E4M3).float(), rtol=0, atol=0, equal_nan=True
    )
    magnitudes = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert list(reader.E2M1) == [*magnitudes, *(-value for value in magnitudes)]
    assert [math.copysign(1, value) for value in reader.E2M1] == [1] * 8 + [-1] * 8


@pytest.mark.parametrize("shift", range(-5, 7))
@pytest.mark.parametrize("code", range(16))
def test_code_times_shift_is_a_normal_e4m3_number_or_zero(code: int, shift: int) -> None:
    value = reader.E2M1[code] * 2.0**shift
    assert value == 0 or 2.0**-6 <= abs(value) <= 448
    byte = torch.tensor(value).to(E4M3)
    assert byte.float().item() == value
    (same_bits,) = (b for b in range(256) if is_same(reader.E4M3[b], value))
    assert byte.view(torch.uint8).item() == same_bits


@pytest.mark.parametrize("shift", range(-5, 7))
def test_magnitude_of_a_codebook_times_shift_is_a_normal_e4m3_number(shift: int) -> None:
    magnitudes = torch.tensor(sorted(reader.BOOK_MAGNITUDES))
    assert (len(magnitudes), magnitudes[0].item(), magnitudes[-1].item()) == (31, 0.5, 7)
    assert set(reader.E2M1[1:8]) <= reader.BOOK_MAGNITUDES
    values = magnitudes * 2.0**shift
    assert bool(((values >= 2.0**-6) & (values <= 448)).all())
    assert torch.equal(values.to(E4M3).float(), values)


def is_same(a: float, b: float) -> bool:
    """Equal, zeros by their sign too."""
    return a == b and math.copysign(1, a) == math.copysign(1, b)


def test_one_shift_more_on_either_side_is_too_many() -> None:
    assert reader.E2M1[1] * 2.0**-6 < 2.0**-6
    assert reader.E2M1[7] * 2.0**7 > 448


def weights(scales: str) -> list[Path]:
    return sorted(
        path for path in VALID.iterdir() if reader.read(path).config["weights"]["scales"] == scales
    )


def decode(
    codes: torch.Tensor,
    settings: dict[str, Any],
    layer: reader.Layer,
    tensors: dict[str, torch.Tensor],
) -> torch.Tensor:
    """What codes stand for before any scale, float32 `[N, K]`."""
    if settings["format"] == "e2m1":
        return E2M1[codes.long()]
    magnitudes = torch.tensor(settings["codebooks"])
    books = torch.cat((magnitudes, -magnitudes), dim=1)
    choice = torch.zeros(codes.shape, dtype=torch.int64)
    if len(books) == 2:
        bits = tensors[f"{layer.name}.weight_codebook"][:, None] >> torch.arange(8)[:, None] & 1
        groups = bits.flatten(0, 1)[: layer.shape[0]].long()
        choice = groups.repeat_interleave(layer.group_size, dim=1)[:, : layer.shape[1]]
    return books[choice, codes.long()]


@pytest.mark.parametrize("folder", weights("m1") + weights("m2"), ids=lambda folder: folder.name)
def test_fp8_times_a_float32_for_each_row_is_the_weight(folder: Path) -> None:
    """By torch and safetensors alone, subnormal row scales and M1's extremes included."""
    checkpoint = reader.read(folder)
    tensors: dict[str, torch.Tensor] = {}
    for shard in checkpoint.manifest["shards"]:
        tensors |= load_file(folder / shard)
    assert sorted(tensors) == sorted(checkpoint.tensors)
    for name, layer in checkpoint.layers.items():
        n, k = layer.shape
        packed = tensors[f"{name}.weight_packed"]
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).view(n, -1)[:, :k]
        b = tensors[f"{name}.weight_scale"].int()
        largest = b.amax(dim=1, keepdim=True)
        shift = (6 - (largest - b)).repeat_interleave(layer.group_size, dim=1)[:, :k]
        wide = torch.ldexp(decode(codes, checkpoint.config["weights"], layer, tensors), shift)
        fp8 = wide.to(E4M3)
        assert torch.equal(fp8.float(), wide)
        row_scale = torch.ones(n, 1)
        if layer.scales == "m2":
            row_scale = tensors[f"{name}.weight_row_scale"].float()[:, None]
        exact = row_scale.double() * 2.0 ** (largest.double() - 127 - 6)
        factor = exact.float()
        assert torch.equal(factor.double(), exact)
        weight = (fp8.float() * factor).flatten()
        expected = torch.tensor(layer.dequantize())
        assert torch.equal(weight.view(torch.int32), expected.view(torch.int32))
