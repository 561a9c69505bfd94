"""Codebooks as Hopper's kernels take them."""

from __future__ import annotations

import torch

from zqfp_convert.numerics import codebook
from zqfp_convert.runtime.kernels.hopper import books


def test_e2m1_is_what_the_kernels_know() -> None:
    have = books.fields((codebook.E2M1,))
    assert (have.low[0], have.high[0]) == (0x14100800, 0x24201C18)  # codebook.cuh
    assert (have.low[1], have.high[1]) == (have.low[0], have.high[0])
    assert not books.given((codebook.E2M1,))
    assert books.given(codebook.PAIR[:1])
    assert books.given(codebook.PAIR)


def test_every_lift_of_every_codebook() -> None:
    """The bytes plus 8 for each step are those of the magnitudes times 2^(lift - 5)."""
    fields = books.fields(codebook.PAIR)
    for place, book in enumerate(codebook.PAIR):
        for lift in range(12):
            steps = lift * 0x08080808
            table = (fields.low[place] + (steps & ~0xFF)) | (fields.high[place] + steps) << 32
            have = torch.tensor(list(table.to_bytes(8, "little")), dtype=torch.uint8)
            want = torch.tensor(book) * 2.0 ** (lift - 5)
            assert torch.equal(have.view(torch.float8_e4m3fn).float(), want)
