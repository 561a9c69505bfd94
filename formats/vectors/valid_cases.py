"""The valid checkpoints among the test vectors of zqfp-1, one function or line each."""

from __future__ import annotations

from collections.abc import Callable

from numbers_by_table import BF16_ONE
from tiny_checkpoint import (
    ONE_SHARD,
    TWO_SHARDS,
    Checkpoint,
    add_layer,
    add_lorc,
    add_offset,
    add_random_layer,
    new_checkpoint,
)

Q, K, DOWN = (
    f"model.layers.0.{part}" for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
)

PAIR: list[list[float]] = [
    [0, 0.5, 1, 1.625, 2.25, 3, 4, 5.5],
    [0, 0.625, 1.25, 2, 2.75, 3.75, 5, 7],
]


def simple(
    scales: str, group_size: int | str, n: int, k: int, span: int = 4, name: str = Q
) -> Checkpoint:
    """One pseudo-random layer."""
    checkpoint = new_checkpoint(group_size, scales, (ONE_SHARD,))
    add_random_layer(checkpoint, name, n, k, span=span)
    return checkpoint


def worked_example() -> Checkpoint:
    """The example that zqfp-1.md explains byte by byte."""
    checkpoint = new_checkpoint(4, "m2", (ONE_SHARD,))
    add_layer(checkpoint, Q, [[2, 11, 0, 7, 5, 14, 1]], [[127, 125]], [0x3FC0])
    return checkpoint


def all_codes() -> Checkpoint:
    """All codes but 8 in both nibbles; the smallest b, and the largest that leaves 6 finite."""
    checkpoint = new_checkpoint(16, "m1", (ONE_SHARD,))
    upwards = [code for code in range(16) if code != 8] + [1]
    codes = [upwards * 2, upwards[::-1] * 2]
    add_layer(checkpoint, Q, codes, [[11, 0], [252, 241]])
    return checkpoint


def zeros(scales: str) -> Checkpoint:
    """Row 0: a group of zeros; row 1: zeros alone; row 2: zeros in the short last group."""
    checkpoint = new_checkpoint(4, scales, (ONE_SHARD,))
    codes = [[1, 2, 3, 4] + [0] * 4 + [15, 1], [0] * 10, [7, 6, 5, 4, 3, 2, 1, 9, 0, 0]]
    top = 127 if scales == "m2" else 121
    exponents = [[top - 3, top, top - 1], [127] * 3, [top - 2, top, top]]
    row_scales = [0x3E12, BF16_ONE, 0x3D7F] if scales == "m2" else None
    add_layer(checkpoint, Q, codes, exponents, row_scales)
    return checkpoint


def negative_zeros() -> Checkpoint:
    """Code 8 among others, as a whole group and as a whole row; no writer makes these."""
    checkpoint = new_checkpoint(4, "m2", (ONE_SHARD,))
    codes = [[8, 1, 8, 15, 8, 8, 8, 8], [8] * 8, [2, 8, 0, 8, 8, 0, 0, 8]]
    exponents = [[125, 127], [127, 127], [127, 127]]
    add_layer(checkpoint, Q, codes, exponents, [0x3E40, BF16_ONE, 0x3E00])
    return checkpoint


def extreme_row_scales() -> Checkpoint:
    """The smallest, the smallest normal and a large row scale: products stay exact in float32."""
    checkpoint = new_checkpoint(2, "m2", (ONE_SHARD,))
    codes = [[1, 7, 9, 3], [1, 5, 15, 2], [7, 15, 1, 9]]
    add_layer(checkpoint, Q, codes, [[127, 116]] * 3, [0x0001, 0x0080, 0x7E2A])
    return checkpoint


def lorc(factors: str) -> Checkpoint:
    """The bound is 4: q_proj has N = 3 and rank 3, k_proj rank 4, down_proj none."""
    checkpoint = simple("m2", 8, 3, 18)
    add_random_layer(checkpoint, K, 6, 18)
    add_random_layer(checkpoint, DOWN, 2, 9)
    add_lorc(checkpoint, 4, factors, {Q: 3, K: 4})
    return checkpoint


def lorc_ranks() -> Checkpoint:
    """The bound is 24: ranks 24, all 9 of k_proj's rows, 8 (below down_proj's K = 10), and none."""
    checkpoint = simple("m2", 16, 25, 27)
    add_random_layer(checkpoint, K, 9, 27)
    add_random_layer(checkpoint, DOWN, 17, 10)
    add_random_layer(checkpoint, "model.layers.0.mlp.up_proj", 10, 17)
    add_lorc(checkpoint, 24, "e4m3", {Q: 24, K: 9, DOWN: 8})
    return checkpoint


def input_offset() -> Checkpoint:
    """An input offset with the bias added for it; K odd."""
    checkpoint = simple("m2", 8, 3, 13)
    add_offset(checkpoint, Q)
    return checkpoint


def codebooks_two() -> Checkpoint:
    """q_proj: 9 rows of 10 groups, the last of one weight. k_proj: all codes of both, and zeros.

    Zeros in k_proj: a group between others, a row, a group of code 8; its row scales are the
    smallest, 1, and the largest that leaves 7 finite.
    """
    checkpoint = new_checkpoint(4, "m2", (ONE_SHARD,), PAIR)
    add_random_layer(checkpoint, Q, 9, 37)
    upwards = list(range(16))
    codes = [
        [*upwards, 0, 0, 0, 0, *upwards, 9],
        [0] * 37,
        [*upwards, *upwards[::-1], 8, 8, 0, 8, 7],
    ]
    exponents = [[127, 116, 125, 124, 127, 116, 126, 127, 120, 116], [127] * 10]
    exponents += [[127, 125, 124, 121, 126, 127, 116, 119, 127, 127]]
    choice = [[0, 1, 1, 0, 0, 1, 0, 0, 1, 1], [0] * 10, [1, 0, 0, 1, 0, 1, 1, 0, 0, 1]]
    add_layer(checkpoint, K, codes, exponents, [0x0001, BF16_ONE, 0x7E12], choice=choice)
    return checkpoint


def codebooks_one() -> Checkpoint:
    """One codebook, so no choice of them; all codes."""
    checkpoint = new_checkpoint(8, "m1", (ONE_SHARD,), PAIR[1:])
    add_random_layer(checkpoint, Q, 3, 20)
    upwards = list(range(16))
    add_layer(checkpoint, K, [upwards, upwards[::-1]], [[11, 0], [252, 241]])
    return checkpoint


def sharded() -> Checkpoint:
    """Two shards, two layers, one of them in both shards."""
    checkpoint = new_checkpoint(16, "m2", TWO_SHARDS)
    add_random_layer(checkpoint, Q, 4, 32)
    add_random_layer(checkpoint, DOWN, 2, 33, shard=TWO_SHARDS[1])
    # A layer may lie in two shards.
    moved = checkpoint.shards[TWO_SHARDS[0]].pop(f"{Q}.weight_row_scale")
    checkpoint.shards[TWO_SHARDS[1]][f"{Q}.weight_row_scale"] = moved
    return checkpoint


def unknown_keys() -> Checkpoint:
    """Keys that no reader knows, in the configuration and in the manifest."""
    checkpoint = simple("m2", 8, 2, 16)
    checkpoint.settings["comment"] = {"anything": [1, None]}
    checkpoint.settings["weights"]["hint"] = "ignored"
    checkpoint.settings["weights"]["codebooks"] = PAIR  # unknown without the feature
    checkpoint.layers[Q]["raised_error"] = 0.5
    return checkpoint


VALID: dict[str, Callable[[], Checkpoint]] = {
    "worked-example": worked_example,
    "m2-group-32-odd": lambda: simple("m2", 32, 3, 77),
    "m2-group-128-odd": lambda: simple("m2", 128, 2, 301),
    "m2-group-row": lambda: simple("m2", "row", 4, 23),
    "m2-group-larger-than-row": lambda: simple("m2", 64, 2, 10),
    "m2-group-odd": lambda: simple("m2", 5, 3, 17),
    "m2-span-11": lambda: simple("m2", 8, 3, 64, 11),
    "m2-extreme-row-scales": extreme_row_scales,
    "m1": lambda: simple("m1", 32, 4, 80),
    "m1-group-row": lambda: simple("m1", "row", 3, 9),
    "m1-all-codes": all_codes,
    "free": lambda: simple("free", 16, 3, 41, 15),
    "m2-zeros": lambda: zeros("m2"),
    "m1-zeros": lambda: zeros("m1"),
    "negative-zeros": negative_zeros,
    "lorc-e4m3": lambda: lorc("e4m3"),
    "lorc-bf16": lambda: lorc("bf16"),
    "lorc-ranks": lorc_ranks,
    "input-offset": input_offset,
    "codebooks-two": codebooks_two,
    "codebooks-one": codebooks_one,
    "sharded": sharded,
    "unknown-keys": unknown_keys,
}
