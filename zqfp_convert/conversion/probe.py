"""How long a conversion will take: its main steps are timed on the device, at sizes of a moment.

Each is then scaled up to the plan by how its work grows with rows, columns and tokens. What comes
out is an estimate: attention, norms and the system's caches are in one factor.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zqfp_convert.calibration.text import GENERATED_AT_ONCE
from zqfp_convert.checkpoint.packed import pack
from zqfp_convert.conversion.block import rounded
from zqfp_convert.conversion.rehearsal import WINDOW, WINDOWS
from zqfp_convert.distill.train import WINDOWS_AT_ONCE
from zqfp_convert.model.configured import configured
from zqfp_convert.model.device import compute_dtype
from zqfp_convert.model.experts import mixtures
from zqfp_convert.numerics import fp8
from zqfp_convert.plan import Plan, PlannedLayer
from zqfp_convert.quantize.hessian import HessianSum, prepare
from zqfp_convert.quantize.refinement import SWEEPS_PER_ROUND
from zqfp_convert.quantize.tensor_cores import tensor_cores
from zqfp_convert.quantize.weight import quantize_weight

ROWS = {"cpu": 512, "cuda": 4096}  # of the weight that is solved, and a quarter of them
COLUMNS = {"cpu": 256, "cuda": 4096}
TOKENS = {"cpu": 1024, "cuda": 16384}
ROUNDED = {"cpu": 1 << 21, "cuda": 1 << 24}  # weights that are rounded
MOMENT = 0.3  # seconds that they are rounded for, again and again
READ = 32 << 20  # bytes, at most
PASSES = 2.6  # of all tokens through a block, of both streams: most stages end or begin halfway
REST = 1.5  # a block's forward pass over the products of its linears
SIMULATED = 2  # times that a linear's inputs are quantized
BACKWARD = 4  # a step of tuning over a forward pass: forward, again, and two products back
PRODUCTS = 4.5  # of a weight and a matrix of its columns, in solving, beside those of sweeps
REHEARSED = 4  # streams of a rehearsal


@dataclass(frozen=True)
class Estimate:
    """What a conversion will take, in seconds, and what it took to find out."""

    seconds: float
    took: float


@torch.no_grad()
def estimate(plan: Plan) -> Estimate:
    """Time the steps of a plan, and add them up."""
    began = time.monotonic()
    checking, moving = _files(plan)
    computing = sum(_rounding(plan) if not plan.recipe.needs_calibration else _calibrating(plan))
    seconds = checking + max(moving, computing)
    return Estimate(seconds, time.monotonic() - began)


def _files(plan: Plan) -> tuple[float, float]:
    """Seconds to look at all weights, and to read them again and write what comes out."""
    held = plan.source.shards.tensors
    fits = [name for name in plan.block_tensors(0) if held[name].bytes <= READ]
    name = max(fits or plan.block_tensors(0), key=lambda name: held[name].bytes)
    found: list[Tensor] = []
    reading = _seconds(plan, lambda: found.append(plan.source.shards.read([name])[name]))
    data = found[0].reshape(-1).view(torch.uint8).numpy().data
    size = max(1, held[name].bytes)
    looking = _seconds(plan, lambda: zlib.crc32(data)) + reading
    writing = _seconds(plan, lambda: hashlib.sha256(data)) + reading
    before = plan.bytes_before / size
    threads = min(4, os.cpu_count() or 1)
    return looking * before / threads, reading * before + writing * plan.bytes_after / size


def _rounding(plan: Plan) -> list[float]:
    """Seconds to round all weights, and to pack them and look whether they keep the rules."""
    kind = plan.device.type
    largest = max((one for each in plan.layers for one in each), key=lambda layer: layer.weights)
    columns = largest.columns
    rows = max(1, min(largest.rows, ROUNDED[kind] // columns))
    weight = _random(plan, rows, columns).to(plan.dtype or torch.float32)

    def work() -> None:
        solved = quantize_weight(weight, None, plan.recipe)
        pack("", solved.codes, solved.scales).check()

    return [_seconds(plan, work, least=MOMENT) * plan.weights / weight.numel() / plan.processes]


def _calibrating(plan: Plan) -> list[float]:
    """Seconds of each step.

    Processes share out tokens and rows; each makes all factorizations, and goes through all columns
    of its rows. Rehearsal and tuning are for the first one alone.
    """
    recipe, kind = plan.recipe, plan.device.type
    tokens = recipe.samples * recipe.seq_len
    here = tokens / plan.processes
    streams = 2 if recipe.asymmetry > 0 else 1
    weight = _weight(plan)
    rows, columns = weight.shape
    batch = torch.randn(TOKENS[kind], columns, device=plan.device)
    batch = batch.to(compute_dtype(plan.device, plan.dtype))

    matrix = weight.to(batch.dtype)
    product = _seconds(plan, lambda: batch @ matrix.t()) / (len(batch) * weight.numel())
    step = _seconds(plan, lambda: batch[:GENERATED_AT_ONCE] @ matrix.t()) / weight.numel()
    simulating = _seconds(plan, lambda: fp8.simulate(batch)) / batch.numel()
    total = HessianSum(columns, cross=streams == 2, device=plan.device)
    original = batch if streams == 2 else None
    adding = _seconds(plan, lambda: total.add(batch, original)) / (len(batch) * columns**2)
    hessian = total.mean()[0]
    order, damping = recipe.activation_order, recipe.damping
    factorizing = _seconds(
        plan, lambda: prepare(hessian, None, damping=damping, activation_order=order)
    )
    factorizing /= columns**3

    with tensor_cores():
        crossing = _seconds(plan, lambda: weight @ hessian) / (rows * columns**2)
    crossing *= PRODUCTS + recipe.sweeps + SWEEPS_PER_ROUND * recipe.low_rank_rounds
    curvature = prepare(hessian, None, damping=damping, activation_order=order)

    def settling(count: int) -> float:
        some = weight[:count]
        taken = _seconds(plan, lambda: quantize_weight(some, curvature, recipe))
        return max(0.0, taken - crossing * count * columns**2)

    # Columns are settled one after another; how long one takes grows with the rows from some on.
    few, many = settling(rows // 4), settling(rows)
    by_weight = max(0.0, many - few) / ((rows - rows // 4) * columns)
    by_column = max(0.0, few / columns - by_weight * (rows // 4))

    passes = inputs = moments = factors = solved = 0.0
    for index, layers in enumerate(plan.layers):
        shares, stages = _shares(plan, index, layers), set()
        for layer in layers:
            share, parent = shares[layer.place], layer.place.rpartition(".")[0]
            passes += share * layer.weights
            inputs += share * layer.columns
            settled = by_column + layer.rows / plan.processes * (
                by_weight + crossing * layer.columns
            )
            solved += layer.columns * settled
            stage = (parent, layer.columns, layer.rows if layer.rows > layer.columns else 0)
            if stage not in stages:
                stages.add(stage)
                # Of one with fewer rows than columns the original's outputs do.
                less = min(1.0, layer.rows / layer.columns) if streams == 2 else 1.0
                moments += share * layer.columns**2 * (1 + 2 * less) / 3
                factors += layer.columns**3
    found = [
        PASSES * REST * streams / 2 * here * passes * product,
        SIMULATED * here * inputs * simulating,
        here * moments * adding,
        factors * factorizing,
        solved,
    ]
    if recipe.rotation != "none" and not any(mixtures(block) for block in plan.blocks.modules):
        choices = {"scales": "free", "scale_rounding": "nearest"}
        one = _seconds(plan, lambda: rounded(plan, weight, **choices))
        found.append(2 * one * plan.weights / weight.numel())
        rehearsed = min(tokens, WINDOWS * min(WINDOW, recipe.seq_len))
        found.append(REST * REHEARSED * rehearsed * passes * product)
    if plan.text is None:
        written = -(-recipe.samples // plan.processes // GENERATED_AT_ONCE)
        found.append(REST * written * recipe.seq_len * passes * step)
    if recipe.tune > 0:
        tuned = recipe.tune * WINDOWS_AT_ONCE * recipe.seq_len
        found.append(REST * BACKWARD * tuned * passes * product)
    return found


def _shares(plan: Plan, index: int, layers: list[PlannedLayer]) -> dict[str, float]:
    """Which part of all tokens comes to each layer of a block, by their names there."""
    found = dict.fromkeys((layer.place for layer in layers), 1.0)
    chosen = configured(plan.model, "num_experts_per_tok") or 1
    for path, experts in mixtures(plan.blocks.modules[index]).items():
        part = min(1.0, chosen / len(experts))
        found |= {place: part for place in found if place.startswith(f"{path}.")}
    return found


def _weight(plan: Plan) -> Tensor:
    """A random weight, like the widest layer but for its size."""
    kind = plan.device.type
    widest = max((one for each in plan.layers for one in each), key=lambda layer: layer.columns)
    rows = max(4, min(widest.rows, ROWS[kind]))
    columns = max(2, min(widest.columns, COLUMNS[kind]))
    return _random(plan, rows, columns)


def _random(plan: Plan, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.02 * torch.randn(rows, columns, generator=generator).to(plan.device)


def _seconds(plan: Plan, work: Callable[[], object], *, least: float = 0.0) -> float:
    """The shorter one of two runs; the first may make what is made once.

    With `least`, the mean of as many as take so many seconds: other programs that want the
    processor too are felt only by what lasts longer than the system's turns.
    """
    found: list[float] = []
    while len(found) < 2 or sum(found[1:]) < least:
        _finish(plan)
        began = time.perf_counter()
        work()
        _finish(plan)
        found.append(time.perf_counter() - began)
    return sum(found[1:]) / len(found[1:]) if least else min(found)


def _finish(plan: Plan) -> None:
    if plan.device.type == "cuda":
        torch.cuda.synchronize(plan.device)
