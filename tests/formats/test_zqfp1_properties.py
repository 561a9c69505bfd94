"""What holds for any checkpoint and any activations: exact fractions and torch as the measure."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import tiny_checkpoint
import torch
import valid_cases
import zqfp1_reader as reader
from hypothesis import given, settings
from hypothesis import strategies as st

MAGNITUDES = [Fraction(halves, 2) for halves in (0, 1, 2, 3, 4, 6, 8, 12)]
BOOK_MAGNITUDES = sorted(  # E4M3 numbers from 1/2 to 7: four significant bits
    {Fraction(m, 8) * 2**e for e in range(3) for m in range(8, 16) if m * 2**e <= 56}
    | {Fraction(m, 16) for m in range(8, 16)}
)
LARGEST = Fraction(2) ** 128 - Fraction(2) ** 104  # of float32


def bf16_fraction(bits: int) -> Fraction:
    exponent, mantissa = divmod(bits, 128)
    if exponent == 0:
        return mantissa * Fraction(2) ** -133
    return (128 + mantissa) * Fraction(2) ** (exponent - 134)


def read(checkpoint: tiny_checkpoint.Checkpoint) -> list[float]:
    with TemporaryDirectory() as folder:
        for name, data in tiny_checkpoint.render(checkpoint).items():
            (Path(folder) / name).write_bytes(data)
        (layer,) = reader.read(folder).layers.values()
        return layer.dequantize().tolist()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_dequantizing_is_exact(data: st.DataObject) -> None:
    scales = data.draw(st.sampled_from(("free", "m1", "m2")))
    n, k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    size = data.draw(st.sampled_from((1, 2, 3, 4, 7, 32, k)))
    group_size: int | str = "row" if size == k and data.draw(st.booleans()) else size
    groups = -(-k // size)
    row = st.lists(st.integers(0, 15), min_size=k, max_size=k)
    codes = data.draw(st.lists(row, min_size=n, max_size=n))
    book = st.permutations(BOOK_MAGNITUDES).map(lambda values: [Fraction(0), *sorted(values[:7])])
    count = 0 if scales == "free" else data.draw(st.integers(0, 2))
    books = data.draw(st.lists(book, min_size=count, max_size=count))
    # The largest BF16 that 7, or E2M1's 6, can multiply in float32.
    bf16 = st.integers(1, 0x7E12 if books else 0x7E2A)
    tables, factors, row_scales, choice = [], [], [], []
    for row_codes in codes:
        is_zero = [not any(c % 8 for c in row_codes[g * size :][:size]) for g in range(groups)]
        one = 0x3F80 if all(is_zero) else data.draw(bf16)
        if scales == "free":
            table = data.draw(st.lists(bf16, min_size=groups, max_size=groups))
            factors.append([bf16_fraction(bits) for bits in table])
        else:
            top = data.draw(st.integers(11, 252)) if scales == "m1" else 127
            top = 127 if all(is_zero) else top
            down = data.draw(st.lists(st.integers(0, 11), min_size=groups, max_size=groups))
            down = [0 if zero else steps for zero, steps in zip(is_zero, down, strict=True)]
            table = [top - steps + min(down) for steps in down]
            row_scale = bf16_fraction(one) if scales == "m2" else 1
            factors.append([Fraction(2) ** (b - 127) * row_scale for b in table])
        tables.append(table)
        row_scales.append(one)
        second = [len(books) == 2 and not zero and data.draw(st.booleans()) for zero in is_zero]
        choice.append(list(map(int, second)))
    checkpoint = tiny_checkpoint.new_checkpoint(
        group_size,
        scales,
        ("model.safetensors",),
        [list(map(float, magnitudes)) for magnitudes in books] or None,
    )
    tiny_checkpoint.add_layer(
        checkpoint,
        "layer",
        codes,
        tables,
        row_scales if scales == "m2" else None,
        choice=choice if len(books) == 2 else None,
    )
    magnitudes = books or [MAGNITUDES]
    expected = [
        (-1 if code >= 8 else 1)
        * magnitudes[choice[r][column // size]][code % 8]
        * factors[r][column // size]
        for r, row_codes in enumerate(codes)
        for column, code in enumerate(row_codes)
    ]
    assert max(map(abs, expected)) <= LARGEST
    assert [Fraction(value) for value in read(checkpoint)] == expected


def quantize_in_torch(values: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor(values, dtype=torch.float32)
    scale = x.abs().amax().clamp(min=2.0**-100) / 448
    return scale, (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def assert_as_torch(values: list[float]) -> None:
    scale, codes = reader.quantize_token(values)
    torch_scale, torch_codes = quantize_in_torch(values)
    if torch.isnan(torch_scale):
        assert scale != scale
    else:
        assert struct.pack("<f", scale) == struct.pack("<f", torch_scale.item())
    # Which NaN it is, the format leaves open.
    canonical = [0x7F if code & 0x7F == 0x7F else code for code in torch_codes.tolist()]
    assert list(codes) == canonical


anything = st.floats(width=32)
near = st.builds(lambda m, e: m * 2.0**e, st.integers(-(2**12), 2**12), st.integers(-16, -2))


@settings(max_examples=300, deadline=None)
@given(st.lists(anything | near, min_size=1, max_size=24))
def test_quantize_token_is_torchs(values: list[float]) -> None:
    assert_as_torch(values)


@settings(max_examples=300, deadline=None)
@given(st.lists(near, min_size=1, max_size=24), st.sampled_from((448.0, 3.0, 1.0, 2.0**-100)))
def test_quantize_token_is_torchs_at_one_magnitude(values: list[float], largest: float) -> None:
    assert_as_torch([value * largest / 448 for value in values] + [largest])


def test_quantize_token_is_torchs_at_and_beside_every_tie() -> None:
    positive = torch.tensor(reader.E4M3[:127])
    ties = (positive[1:] + positive[:-1]) / 2
    beside = [torch.nextafter(ties, torch.tensor(bound)) for bound in (0.0, 448.0)]
    row = torch.cat([torch.tensor([448.0]), positive, ties, *beside])
    assert_as_torch([*row.tolist(), *(-row).tolist()])


def test_rounding_to_e4m3_saturates() -> None:
    """No token's own scale leads there, as a quotient is 448 or the next float32 at most."""
    for value in (448.0, 448.1, 464.0, 480.0, 3e38, float("inf")):
        assert [reader._encode_e4m3(sign * value) for sign in (1, -1)] == [0x7E, 0xFE]


def test_bits_a_weight_with_two_codebooks() -> None:
    n, k = 16, 1280
    books = valid_cases.PAIR
    checkpoint = tiny_checkpoint.new_checkpoint(128, "m2", ("model.safetensors",), books)
    tiny_checkpoint.add_random_layer(checkpoint, "layer", n, k)
    with TemporaryDirectory() as folder:
        for name, data in tiny_checkpoint.render(checkpoint).items():
            (Path(folder) / name).write_bytes(data)
        layer = reader.read(folder).layers["layer"]
    assert layer.bits_per_weight == 4 + 8 / 128 + 16 / k + 1 / 128


def test_bits_a_weight_are_those_of_the_bytes() -> None:
    n, k = 2, 256
    checkpoint = tiny_checkpoint.new_checkpoint(128, "m2", ("model.safetensors",))
    tiny_checkpoint.add_random_layer(checkpoint, "layer", n, k)
    tiny_checkpoint.add_lorc(checkpoint, 1, "e4m3", {"layer": 1})
    with TemporaryDirectory() as folder:
        for name, data in tiny_checkpoint.render(checkpoint).items():
            (Path(folder) / name).write_bytes(data)
        layer = reader.read(folder).layers["layer"]
    assert layer.bits_per_weight == 4 + 8 / 128 + 16 / k + 8 * (n + k + 4) / (n * k)
