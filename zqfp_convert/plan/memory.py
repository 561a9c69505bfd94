"""What a conversion takes of host and device memory at its peak, from shapes alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from zqfp_convert.calibration.experts import sums_bytes
from zqfp_convert.calibration.text import GENERATED_AT_ONCE, reading_bytes
from zqfp_convert.checkpoint.source.source import PIECE
from zqfp_convert.distill import memory as tuning_memory
from zqfp_convert.distill.train import TOKENS_AT_ONCE as COMPARED_AT_ONCE
from zqfp_convert.model.configured import configured
from zqfp_convert.model.device import compute_dtype
from zqfp_convert.quantize.hessian import SLICE

if TYPE_CHECKING:
    from zqfp_convert.plan.plan import Plan, PlannedLayer

WAITING = 2  # of the first blocks, where what lies outside of them takes long to write
TOGETHER = 1 << 27  # weights of one input, at most, that are solved at once
SOLVERS_COPIES = 7  # of a weight: target, values, errors, and what each step makes of them
TARGETS_COPIES = 5  # of a weight, while its target is found: itself, both its parts, the move
TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 16384}  # of a calibration batch
INPUTS = 6  # float32 copies of a batch at the widest linear: as it is, quantized, what that loses
ROUNDED = 3.5  # bytes a weight that codes take while a layer is packed and checked
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
TOKENIZER = 13  # times the size of its file, while it is loaded
COMPARED = 5  # float32 copies of logits, where two models are compared
CHECKED_AT_ONCE = 4  # tensors that are looked at for NaN
CALIBRATING = 8 << 20  # small tensors of a model's passes, among others in heaps
LIBRARIES = 400 << 20  # CUDA's, of which pages are loaded as kernels are
ALWAYS = 12 << 20  # slices that are rounded, heaps of threads, journal and manifest


def solving_bytes(plan: Plan) -> int:
    """What solving takes beside a layer's Hessian and one more matrix of its size.

    First some rows of the Hessian, while it is factorized; with a target of its own for the weight
    one more matrix, the factor, and copies of the weight in float32; then more copies of that, and
    the factor in the place of the other matrix.
    """
    most = 0
    for block in plan.layers:
        weights: dict[tuple[str, int], list[int]] = defaultdict(list)  # that may share an input
        for layer in block:
            weights[layer.place.rpartition(".")[0], layer.columns].append(layer.weights)
        for (_, columns), each in weights.items():
            # What a narrower input's matrices leave of those of the widest input is free.
            free = _left_by(plan, columns) if plan.recipe.needs_calibration else 0
            most = max(most, _solving_together(plan, columns, each) - free)
    return most


def spare_bytes(plan: Plan, layers: Sequence[PlannedLayer]) -> int:
    """What solving layers of one input leaves of the memory that the largest ones take.

    Half of the memory for solving is left to the batches that go through a block meanwhile.
    """
    columns, most = layers[0].columns, solving_bytes(plan)
    own = _solving_together(plan, columns, [layer.weights for layer in layers])
    return _left_by(plan, columns) + min(most - own, most // 2)


def _solving_together(plan: Plan, columns: int, weights: list[int]) -> int:
    """What solving weights takes that may share an input, beside two matrices of that."""
    if not plan.recipe.needs_calibration:
        return 4 * SOLVERS_COPIES * max(weights)
    at_once = max(max(weights), min(sum(weights), TOGETHER))
    aiming = columns**2 + TARGETS_COPIES * at_once if plan.recipe.asymmetry > 0 else 0
    factorizing = min(SLICE, columns) * columns
    return 4 * max(SOLVERS_COPIES * at_once, aiming + factorizing)


def _left_by(plan: Plan, columns: int) -> int:
    """What the two matrices of an input leave of the memory for those of the widest input."""
    widest = max(layer.columns for block in plan.layers for layer in block)
    return 8 * (widest**2 - columns**2)


def states_bytes(plan: Plan) -> int:
    """The hidden states of the calibration text, of all streams that one process has."""
    recipe = plan.recipe
    streams = 2 if recipe.asymmetry > 0 or recipe.tune > 0 else 1
    samples = -(-recipe.samples // plan.processes)
    tuned_on = max(recipe.samples, recipe.tune_samples) if recipe.tune > 0 else recipe.samples
    of_original = -(-tuned_on // plan.processes) if streams == 2 else 0
    return (samples + of_original) * _window(plan)


def peaks(plan: Plan) -> tuple[int, int]:
    """Estimated peaks of host and device memory; on the CPU both are one and in the first."""
    host, work = _host(plan), 0
    on_cpu = plan.device.type == "cpu"
    if plan.recipe.needs_calibration:
        work = _calibrating(plan)
        host += _handed_on(plan) + (CALIBRATING if on_cpu else 0)
        if plan.states == "host":  # locked memory comes in powers of two, as windows of a batch do
            window = _window(plan)
            host += states_bytes(plan) // window * (1 << (window - 1).bit_length())
    elif not on_cpu:
        blocks = [_block_bytes(plan, index) for index in range(len(plan.layers))]
        ahead = 2 if len(blocks) > 1 else 1
        work = max(
            ahead * max(blocks) + _packed(plan) + solving_bytes(plan), _largest_outside(plan)
        )
    together, taken = plan.host_processes, host + work if on_cpu else host
    return together * max(taken, _reading(plan)), 0 if on_cpu else work


def _reading(plan: Plan) -> int:
    """Until there are windows of a given text, while weights are looked at."""
    recipe = plan.recipe
    if plan.text is None or not recipe.needs_calibration:
        return 0
    extra = max(0, recipe.tune_samples - recipe.samples) if recipe.tune > 0 else 0
    files = (plan.source.folder / name for name in TOKENIZER_FILES)
    tokenizer = TOKENIZER * max(
        (file.stat().st_size for file in files if file.is_file()), default=0
    )
    reading = reading_bytes(recipe.samples, recipe.seq_len, extra)
    return ALWAYS + _checked(plan) + tokenizer + reading


def _window(plan: Plan) -> int:
    """Hidden states of one window."""
    width = compute_dtype(plan.device, plan.dtype).itemsize
    return plan.recipe.seq_len * (configured(plan.model, "hidden_size") or 0) * width


def _block_bytes(plan: Plan, index: int) -> int:
    """Of a block, as it is read."""
    held = plan.source.shards.tensors
    return sum(held[name].bytes for name in plan.block_tensors(index))


def _packed(plan: Plan) -> int:
    """The largest block, as it is written."""
    held = plan.source.shards.tensors
    return max(
        _block_bytes(plan, index)
        - sum(held[f"{layer.disk}.weight"].bytes - layer.packed_bytes for layer in layers)
        for index, layers in enumerate(plan.layers)
    )


def _others(plan: Plan) -> list[int]:
    """Shards of what lies outside the blocks."""
    held = plan.source.shards.tensors
    return [sum(held[name].bytes for name in names) for names in plan.other_shards] or [0]


def _largest_outside(plan: Plan) -> int:
    """The largest tensor outside the blocks."""
    held = plan.source.shards.tensors
    return max((held[name].bytes for names in plan.other_shards for name in names), default=0)


def blocks_waiting(plan: Plan) -> int:
    """How many of the first blocks are kept until what lies outside the blocks is written."""
    return WAITING if plan.processes == 1 and _others(plan)[-1] > _packed(plan) else 0


def _host(plan: Plan) -> int:
    """Files that are read and written, beside what is computed with.

    The next block is read and the last one written while one is quantized; the first ones wait
    until what lies outside the blocks is written.
    """
    blocks = [_block_bytes(plan, index) for index in range(len(plan.layers))]
    packed, others = _packed(plan), _others(plan)
    ahead, before = (2, 1) if len(blocks) > 1 else (1, 0)
    waiting = min(blocks_waiting(plan), len(blocks) - 1)
    written = max(before * packed, others[-1] + waiting * packed)
    largest = max(layer.weights for block in plan.layers for layer in block)
    passing = max((one + other for one, other in pairwise(others)), default=0)
    on_cpu = plan.device.type == "cpu"
    rounding = int(ROUNDED * largest) if on_cpu and not plan.recipe.needs_calibration else 0
    return (
        ALWAYS
        + (0 if on_cpu else LIBRARIES)
        + max(
            ahead * max(blocks) + packed + written + rounding,
            passing,
            _checked(plan),
        )
    )


def _checked(plan: Plan) -> int:
    """Tensors that are looked at for NaN at once: in pieces, but for those that are made."""
    held = plan.source.shards.tensors.values()
    at_once = (i.bytes if i.start is None else min(i.bytes, PIECE) for i in held)
    return sum(sorted(at_once, reverse=True)[:CHECKED_AT_ONCE])


def _handed_on(plan: Plan) -> int:
    """What calibration and tuning leave in host memory."""
    recipe, every = plan.recipe, [layer for block in plan.layers for layer in block]
    total = 0
    cross = recipe.asymmetry > 0
    if any(sums_bytes(block, plan.device, cross=cross) for block in plan.blocks.modules):
        streams = 2 if cross or recipe.tune > 0 else 1  # what reaches the experts
        total += streams * -(-recipe.samples // plan.processes) * _window(plan)
    if recipe.tune > 0:
        tuned_on = max(recipe.samples, recipe.tune_samples)
        total += tuned_on * _window(plan) // plan.host_processes  # the original, when it is tuned
        total += sum(layer.packed_bytes for layer in every)
    return total


def batch_bytes(plan: Plan) -> int:
    """What a batch that goes through a block on a GPU may take, with statistics collected of it.

    As much as solving takes later; more where something before takes more than all of calibration.
    """
    return max(solving_bytes(plan), plan.device_memory - _standing(plan))


def _standing(plan: Plan) -> int:
    """What is there while a block is calibrated, beside what batches or solving take."""
    recipe, on_cpu = plan.recipe, plan.device.type == "cpu"
    width = compute_dtype(plan.device, plan.dtype).itemsize
    widest = max(layer.columns for block in plan.layers for layer in block)
    # A block, what its linears are replaced with, and on a GPU the next one, read ahead.
    standing = (2 if on_cpu else 3) * max(_numbers(plan)) * width
    # Without tuning there are no embeddings once hidden states have entered, and no head.
    standing += _outside(plan) - (0 if recipe.tune > 0 else _embeddings(plan.model) * width)
    standing += states_bytes(plan) if plan.states == "device" else 0
    standing += 2 * 4 * widest**2 + _experts(plan)
    if recipe.tune > 0:
        shapes = [(layer.rows, layer.columns) for block in plan.layers for layer in block]
        standing += tuning_memory.waiting(shapes, recipe, roundings=plan.tunes_roundings)
    return standing


def _calibrating(plan: Plan) -> int:
    """The largest of calibrating, tuning and having the model write text, on the device."""
    model, recipe = plan.model, plan.recipe
    width = compute_dtype(plan.device, plan.dtype).itemsize
    solving = solving_bytes(plan)
    if recipe.rank == "auto":  # layers of one input wait for one another
        solving += 4 * 3 * max(sum(layer.weights for layer in block) for block in plan.layers)
    if plan.device.type == "cpu":  # on a GPU `windows_at_once` sees to it that they fit
        tokens = min(max(TOKENS_AT_ONCE["cpu"], recipe.seq_len), recipe.samples * recipe.seq_len)
        widest = max(layer.columns for block in plan.layers for layer in block)
        solving = max(solving, INPUTS * tokens * widest * 4)  # one after the other
    most = _standing(plan) + solving
    outside, blocks = _outside(plan), sum(_numbers(plan))
    if recipe.rotation != "none" and not _experts(plan):  # two models; one is turned, in float32
        shards = plan.source.shards.tensors
        turning = 3 * 4 * max(_count(info.shape) for info in shards.values())
        compared = min(COMPARED_AT_ONCE, recipe.samples * recipe.seq_len)
        comparing = COMPARED * 4 * compared * (configured(model, "vocab_size") or 0)
        most = max(most, 2 * outside + max(turning, comparing))
    if plan.text is None or (recipe.tune > 0 and recipe.tune_samples > 0):  # may be written
        everything = int(1.2 * (blocks * width + outside))
        most = max(most, everything + _cache_bytes(plan, width))
    if recipe.tune > 0:
        tuning = tuning_memory.tuning(
            [[(layer.rows, layer.columns) for layer in block] for block in plan.layers],
            recipe,
            roundings=plan.tunes_roundings,
            hidden=configured(model, "hidden_size") or 0,
            vocabulary=configured(model, "vocab_size") or 0,
            width=width,
            rest=outside + (blocks - plan.weights) * width,
        )
        most = max(most, tuning)
    return most


def _numbers(plan: Plan) -> list[int]:
    """How many numbers each block has."""
    shards = plan.source.shards.tensors
    blocks = (plan.block_tensors(index) for index in range(len(plan.layers)))
    return [sum(_count(shards[name].shape) for name in names) for names in blocks]


def _outside(plan: Plan) -> int:
    """What is in no block, as it is computed with."""
    shards = plan.source.shards.tensors
    width = compute_dtype(plan.device, plan.dtype).itemsize
    return sum(_count(shards[n].shape) for part in plan.other_shards for n in part) * width


def _experts(plan: Plan) -> int:
    """The most that the sums of a block's experts take."""
    cross = plan.recipe.asymmetry > 0
    return max(sums_bytes(block, plan.device, cross=cross) for block in plan.blocks.modules)


def _embeddings(model: PreTrainedModel) -> int:
    """How many numbers the token embedding and the output head have."""
    found = {model.get_input_embeddings(), model.get_output_embeddings()} - {None}
    return sum({id(p): p.numel() for part in found for p in part.parameters()}.values())


def _cache_bytes(plan: Plan, width: int) -> int:
    """Keys, values and logits of the windows that the model writes at once."""
    model = plan.model
    heads = configured(model, "num_attention_heads") or 1
    groups = configured(model, "num_key_value_heads") or heads
    extent = configured(model, "head_dim") or (configured(model, "hidden_size") or 0) // heads
    recipe = plan.recipe
    written = max(recipe.samples, recipe.tune_samples if recipe.tune > 0 else 0)
    together = min(GENERATED_AT_ONCE, written)
    keys_and_values = 2 * len(plan.layers) * groups * extent * plan.recipe.seq_len * width
    return int(together * (keys_and_values + 8 * (configured(model, "vocab_size") or 0)))


def _count(extents: tuple[int, ...]) -> int:
    number = 1
    for extent in extents:
        number *= extent
    return number
