"""Weights and factors in the order of Hopper's tensor cores, against loops over the formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from packed_layers import random_layer

from zqfp_convert.numerics import codebook, nibbles
from zqfp_convert.runtime.kernels.hopper import layout


@pytest.mark.parametrize(
    ("group_size", "columns", "want"),
    [
        (32, 1000, True),
        (96, 1000, True),
        (1000, 1000, True),
        (33, 33, True),
        (1, 1, True),
        (16, 1000, False),
        (48, 1000, False),
        (33, 34, False),
    ],
)
def test_what_is_supported(group_size: int, columns: int, want: bool) -> None:
    assert layout.supports(group_size, columns) is want


@pytest.mark.parametrize(
    ("group_size", "columns", "want"),
    [(32, 512, 4), (64, 512, 2), (96, 512, 4), (128, 512, 1), (192, 512, 2), (256, 512, 1),
     (512, 512, 1), (33, 33, 1)],
)  # fmt: skip
def test_scales_in_a_chunk(group_size: int, columns: int, want: int) -> None:
    assert layout.groups_in_chunk(group_size, columns) == want


@pytest.mark.parametrize("books", [(codebook.E2M1,), codebook.PAIR], ids=["e2m1", "pair"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 150])
def test_where_each_weight_and_lift_goes(
    group_size: int, books: tuple[codebook.Codebook, ...]
) -> None:
    """Which thread, word, nibble and bit holds weight [n, k], one by one."""
    rows, columns = 70, 150
    layer = random_layer("m2", rows, columns, group_size, books=books)
    about = group_size, columns, layer.books, layer.choice
    chunks = layout.arrange(layer.packed, layer.scale, *about)
    assert chunks.books == books
    groups = chunks.groups
    assert chunks.data.shape == (2, 2, 64 * 128 // 2 + 64 * groups)
    codes = nibbles.unpack(layer.packed, columns).tolist()
    top = layer.scale.amax(1).tolist()
    data = chunks.data.tolist()
    for n in range(128):
        warp, g, lower = n % 64 // 16, n % 8, n % 16 // 8
        for k in range(256):
            chunk = data[n // 64][k // 128]
            half, step = k % 128 // 64, k % 64 // 32
            further, t, i = k % 32 // 16, k % 16 // 4, k % 4
            thread = 32 * warp + 4 * g + t
            first = 2048 * half + 16 * thread + 4 * (2 * step + lower)
            word = int.from_bytes(bytes(chunk[first : first + 4]), "little")
            magnitude = word >> 4 * (4 * further + i) & 7
            sign = word >> (8 * i + (3 if further else 7)) & 1
            want = codes[n][k] if n < rows and k < columns else 0
            assert magnitude | sign << 3 == want
            lift = chunk[4096 + ((8 * warp + g) * groups + k % 128 * groups // 128) * 2 + lower]
            if n < rows and k < columns:
                assert lift & 127 == 11 - (top[n] - int(layer.scale[n, k // group_size]))
                marks = 0 if layer.choice is None else int(layer.choice[n // 8, k // group_size])
                assert lift >> 7 == marks >> n % 8 & 1
            assert 0 <= lift & 127 <= 11


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 500),
    group_size=st.one_of(st.integers(1, 16).map(lambda runs: 32 * runs), st.integers(1, 600)),
    kind=st.sampled_from(["m1", "m2"]),
    books=st.sampled_from([(codebook.E2M1,), codebook.PAIR]),
    seed=st.integers(0, 1 << 20),
)
def test_there_and_back(
    rows: int,
    columns: int,
    group_size: int,
    kind: str,
    books: tuple[codebook.Codebook, ...],
    seed: int,
) -> None:
    assume(layout.supports(group_size, columns))
    layer = random_layer(kind, rows, columns, group_size, seed=seed, books=books)
    about = group_size, columns, layer.books, layer.choice
    chunks = layout.arrange(layer.packed, layer.scale, *about)
    assert chunks.data.is_contiguous()
    packed, below = layout.restore(chunks, rows, columns, group_size)
    assert torch.equal(packed, layer.packed)
    assert below.shape == layer.scale.shape
    assert torch.equal(layer.scale.amax(1, keepdim=True) - below, layer.scale)


def test_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer("m2", 300, 200, 32)
    want = layout.arrange(layer.packed, layer.scale, 32, 200)
    monkeypatch.setattr(layout, "PART", 64 * 256 * 2)
    have = layout.arrange(layer.packed, layer.scale, 32, 200)
    assert torch.equal(have.data, want.data)
    packed, below = layout.restore(have, 300, 200, 32)
    assert torch.equal(packed, layer.packed)
    assert torch.equal(127 - below, layer.scale)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize(("rows", "rank"), [(1, 1), (64, 8), (70, 20), (200, 9)])
def test_the_outer_factor(rows: int, rank: int, dtype: torch.dtype) -> None:
    B = torch.randn(rows, rank).to(dtype)
    outer = layout.outer_factor(B)
    tiles, steps = -(-rows // 64), -(-rank // 8)
    assert outer.shape == (tiles, steps, 128, 4)
    assert outer.dtype == torch.bfloat16
    assert outer.is_contiguous()
    for n in range(tiles * 64):
        for r in range(steps * 8):
            thread = 32 * (n % 64 // 16) + 4 * (n % 8) + r % 8 // 2
            have = outer[n // 64, r // 8, thread, n % 16 // 8 * 2 + r % 2]
            assert float(have) == (float(B[n, r].float()) if n < rows and r < rank else 0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize(("rank", "columns"), [(1, 1), (8, 128), (9, 129)])
def test_the_inner_factor(rank: int, columns: int, dtype: torch.dtype) -> None:
    A = torch.randn(rank, columns).to(dtype)
    inner = layout.inner_factor(A)
    assert inner.shape == (rank + -rank % 8, columns + -columns % 128)
    assert inner.dtype == torch.bfloat16
    assert torch.equal(inner[:rank, :columns].float(), A.float())
    assert not inner[rank:].any()
    assert not inner[:, columns:].any()


def test_by_row() -> None:
    values = torch.randn(70).half()
    have = layout.by_row(values)
    assert have.dtype == torch.float32
    assert torch.equal(have, torch.cat([values.float(), torch.zeros(58)]))
    assert layout.by_row(torch.ones(64)).shape == (64,)
