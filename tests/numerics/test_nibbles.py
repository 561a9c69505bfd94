"""Nibbles: every byte both ways, odd numbers of columns, round trips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zqfp_convert.numerics import nibbles


def test_every_byte() -> None:
    packed = torch.arange(256, dtype=torch.int16).to(torch.uint8)[:, None]
    codes = nibbles.unpack(packed, 2)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [[byte % 16, byte // 16] for byte in range(256)]
    assert torch.equal(nibbles.pack(codes), packed)


def test_even_columns_lie_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 3, 4], [15, 0, 0, 15]], dtype=torch.uint8)
    assert nibbles.pack(codes).tolist() == [[0x21, 0x43], [0x0F, 0xF0]]


@pytest.mark.parametrize("columns", [1, 3, 7])
def test_the_last_odd_nibble_is_zero(columns: int) -> None:
    packed = nibbles.pack(torch.full((2, columns), 15, dtype=torch.uint8))
    assert packed.tolist() == [[0xFF] * (columns // 2) + [0x0F]] * 2
    assert nibbles.unpack(packed, columns).tolist() == [[15] * columns] * 2


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 19), st.integers(0, 2**32))
def test_codes_survive_packing(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (rows, columns), generator=generator, dtype=torch.uint8)
    before = codes.clone()
    packed = nibbles.pack(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-columns // 2))
    assert torch.equal(nibbles.unpack(packed, columns), codes)
    assert torch.equal(codes, before)


def test_views_pack_like_copies() -> None:
    codes = torch.randint(16, (6, 10), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(nibbles.pack(codes.t()), nibbles.pack(codes.t().contiguous()))
