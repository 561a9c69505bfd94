"""How big the tiles of the fused multiplication are, from its shape alone."""

from __future__ import annotations

from typing import NamedTuple

LEAST_BLOCKS = 4  # of 128 columns; a shorter share of K is not worth the second kernel
MOST_SPLITS = 8
SPLIT_TOKENS = 128  # with more tokens the float32 sums would weigh more than the weights


class Tiles(NamedTuple):
    """One program multiplies `rows` output features with `tokens` tokens over its share of K.

    Attributes:
        rows, tokens: of the tile, powers of two, at least 16.
        splits: programs that share the columns of a tile.
        band: tiles of tokens that walk through the rows together, to share weights in the cache.
        warps, stages: of the compiled program.
    """

    rows: int
    tokens: int
    splits: int
    band: int
    warps: int
    stages: int


def choose(tokens: int, rows: int, blocks: int, processors: int) -> Tiles:
    """The tiles for M tokens, N rows, K' / 128 blocks and a number of multiprocessors.

    The largest tile that stays in registers and still gives every processor one: each unpacked
    weight then meets most tokens. Where even the smallest gives too few, K is split until every
    processor has two programs; reading weights is all that counts there, so loads run far ahead.
    """
    wide = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    sizes = [(64, wide)]
    if tokens > 32:
        sizes.insert(0, (128, 64))
    if tokens > 64:
        sizes.insert(0, (128, 128))
    for tile_rows, tile_tokens in sizes:
        programs = -(-rows // tile_rows) * -(-tokens // tile_tokens)
        if programs >= processors:
            break
    splits = 1
    while (
        tokens <= SPLIT_TOKENS
        and splits < MOST_SPLITS
        and programs * splits < 2 * processors
        and blocks >= 2 * splits * LEAST_BLOCKS
    ):
        splits *= 2
    return Tiles(
        tile_rows,
        tile_tokens,
        splits,
        band=1 if tokens <= 64 else 8,
        warps=8 if tile_tokens == 128 else 4,
        stages={128: 3, 64: 4}.get(tile_tokens, 5),
    )
