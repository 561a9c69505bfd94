"""What tuning needs of a device's memory, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable

from zqfp_convert.distill.grid import ELEMENTS_AT_ONCE
from zqfp_convert.distill.train import TOKENS_AT_ONCE, WINDOWS_AT_ONCE
from zqfp_convert.quantize.ranks import at_most
from zqfp_convert.recipe import Recipe

Shape = tuple[int, int]  # of a quantized weight: N, K
PLACE = {True: 2 + 2, False: 1}  # bytes a weight: start and shift in 16 bits, or the code alone
MOMENTS = {True: 2 + 2, False: 0}  # of Adam, for shifts
SLICES = 10  # float32 copies of a slice of a weight, in its backward pass or in Adam's step
COPIES = 4  # of a linear's inputs and outputs that a block's backward pass holds
LOGITS = 8  # float32 copies of a slice's logits


def waiting(shapes: Iterable[Shape], recipe: Recipe, *, roundings: bool) -> int:
    """Bytes of solved linears that wait to be tuned."""
    total = 0
    for rows, columns in shapes:
        size = columns if recipe.group_size == "row" else recipe.group_size
        groups = -(-columns // size)
        rank = at_most(recipe.rank, rows, columns)
        total += rows * columns * PLACE[roundings]
        total += rows * groups * 8  # scale, exponent and choice
        total += rows * 8 + rank * (rows + columns) * 5
    return total


def tuning(
    blocks: list[list[Shape]],
    recipe: Recipe,
    *,
    roundings: bool,
    hidden: int,
    vocabulary: int,
    width: int,
    rest: int,
) -> int:
    """Bytes at the peak of tuning.

    Args:
        blocks: the linears of each block that are quantized.
        recipe: whose ranks, groups and windows they are.
        roundings: whether they are tuned too.
        hidden, vocabulary: of the model.
        width: bytes of a number in the dtype of computation.
        rest: bytes of all weights that are not quantized.
    """
    every = [shape for block in blocks for shape in block]
    tokens = WINDOWS_AT_ONCE * recipe.seq_len
    state = waiting(every, recipe, roundings=roundings)
    for rows, columns in every:
        rank = at_most(recipe.rank, rows, columns)
        state += rows * columns * MOMENTS[roundings] + 8 * (rows + rank * (rows + columns))
    entries = len(blocks) * tokens * hidden * width
    weights = max(sum(rows * columns for rows, columns in block) for block in blocks) * width
    largest = max(rows * columns for rows, columns in every)
    gradient = largest * (width + 2) + SLICES * 4 * min(largest, ELEMENTS_AT_ONCE)
    features = max(sum(rows + columns for rows, columns in block) for block in blocks)
    block = weights + gradient + COPIES * tokens * features * width
    head = LOGITS * 4 * min(TOKENS_AT_ONCE, tokens) * vocabulary
    return state + rest + entries + max(block, head)
