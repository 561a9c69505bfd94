"""The arrangement of weights for the kernels, and its inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from packed_layers import random_layer

from zqfp_convert.numerics import nibbles
from zqfp_convert.runtime.kernels.portable import layout


@pytest.mark.parametrize(
    ("group_size", "columns", "want"),
    [
        (32, 1000, True),
        (96, 1000, True),
        (384, 1000, True),
        (1000, 1000, True),
        (33, 33, True),
        (5, 3, True),
        (1, 1, True),
        (16, 1000, False),
        (48, 1000, False),
        (33, 34, False),
    ],
)
def test_what_is_supported(group_size: int, columns: int, want: bool) -> None:
    assert layout.supports(group_size, columns) is want


@pytest.mark.parametrize("columns", [1, 33, 128, 129, 300])
def test_where_each_column_goes(columns: int) -> None:
    layer = random_layer("m2", 5, columns, 32)
    weights, _ = layout.arrange(layer.packed, layer.scale, 32, columns)
    width = layout.padded(columns)
    assert weights.shape == (5, width // 2)
    assert width % 128 == 0
    assert width - columns < 128
    codes = nibbles.unpack(layer.packed, columns)
    for k in range(width):
        byte = weights[:, k // 128 * 64 + k % 64]
        have = byte >> 4 if k % 128 >= 64 else byte & 15
        assert torch.equal(have, codes[:, k] if k < columns else torch.zeros_like(have))
    assert torch.equal(layout.codes_of(weights)[:, :columns], codes)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 700),
    group_size=st.one_of(st.integers(1, 24).map(lambda runs: 32 * runs), st.integers(1, 800)),
    kind=st.sampled_from(["m1", "m2"]),
    seed=st.integers(0, 1 << 20),
)
def test_there_and_back(rows: int, columns: int, group_size: int, kind: str, seed: int) -> None:
    assume(layout.supports(group_size, columns))
    layer = random_layer(kind, rows, columns, group_size, seed=seed)
    weights, shifts = layout.arrange(layer.packed, layer.scale, group_size, columns)
    packed, below = layout.restore(weights, shifts, group_size, columns)
    assert torch.equal(packed, layer.packed)
    assert torch.equal(layer.scale.amax(1, keepdim=True) - below, layer.scale)
    assert int(shifts.max()) <= 11
    width = 2 * weights.shape[1]
    step = layout.step(group_size, columns)
    assert shifts.shape == (rows, -(-width // step))
    assert weights.is_contiguous()
    assert shifts.is_contiguous()
    of_columns = layout.shifts_of(shifts, group_size, width)
    assert of_columns.shape == (rows, width)
    assert torch.equal(of_columns[:, :columns], below.repeat_interleave(group_size, 1)[:, :columns])


def test_a_group_size_that_is_not_supported() -> None:
    layer = random_layer("m2", 5, 100, 16)
    with pytest.raises(AssertionError, match="groups of 16"):
        layout.arrange(layer.packed, layer.scale, 16, 100)
