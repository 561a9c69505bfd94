"""The sizes of tiles keep their promises for every shape."""

from __future__ import annotations

import pytest

from zqfp_convert.runtime.kernels.portable import tiles


@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 32, 33, 64, 65, 128, 4096])
@pytest.mark.parametrize("rows", [1, 17, 1024, 4096, 28672, 128256])
@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 32, 112])
def test_every_shape(tokens: int, rows: int, blocks: int) -> None:
    chosen = tiles.choose(tokens, rows, blocks, 132)
    for extent in (chosen.rows, chosen.tokens):
        assert extent >= 16
        assert extent & (extent - 1) == 0
    assert chosen.tokens >= min(tokens, 64)
    assert 1 <= chosen.splits <= tiles.MOST_SPLITS
    if chosen.splits > 1:
        assert tokens <= tiles.SPLIT_TOKENS
        assert blocks // chosen.splits >= tiles.LEAST_BLOCKS


def test_few_rows_are_split_and_many_are_not() -> None:
    assert tiles.choose(1, 1024, 32, 132).splits == 8
    assert tiles.choose(1, 4096, 32, 132).splits > 1
    assert tiles.choose(1, 28672, 32, 132).splits == 1
    assert tiles.choose(1024, 1024, 112, 132).splits == 1


def test_tiles_grow_with_the_work() -> None:
    assert tiles.choose(8192, 4096, 32, 132)[:2] == (128, 128)
    assert tiles.choose(256, 4096, 32, 132)[:2] == (64, 64)
    assert tiles.choose(256, 28672, 32, 132)[:2] == (128, 128)
