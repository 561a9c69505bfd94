"""Measures schedules on the GPU at hand, to make a table of the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from statistics import median

import torch
from torch import Tensor

from zqfp_convert.numerics import fp8
from zqfp_convert.runtime import expanded
from zqfp_convert.runtime.kernels.hopper import layout, schedules
from zqfp_convert.runtime.kernels.hopper.expand import expand
from zqfp_convert.runtime.kernels.hopper.layout import Chunks
from zqfp_convert.runtime.kernels.hopper.multiply import (
    Inputs,
    Matrix,
    Schedule,
    flag_count,
    multiply,
)
from zqfp_convert.runtime.kernels.hopper.quantize import quantize
from zqfp_convert.runtime.kernels.hopper.schedules import Entry

TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
COLD = 200 << 20  # bytes of weights in turn, so that none are still in the L2 cache
REPLAYS = 5
MICROSECONDS = 1e3  # in the milliseconds of an event


def tune(rows: int, columns: int, tokens: tuple[int, ...] = TOKENS) -> Iterator[Entry]:
    """The fastest schedules for a weight `[N, K]`, for each number of tokens, on this GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    weights = _weights(rows, columns, device)
    for count in tokens:
        yield _fastest(rows, columns, count, weights, device)


def _weights(rows: int, columns: int, device: torch.device) -> list[Chunks]:
    tiles, depth = -(-rows // layout.ROWS), -(-columns // layout.COLUMNS)
    shape = (tiles, depth, layout.chunk_bytes(1))
    copies = max(2, -(-COLD // (rows * columns // 2)))
    made = []
    for _ in range(copies):
        data = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        data[..., layout.CODES_BYTES :] = 11 - data[..., layout.CODES_BYTES :] % 3
        made.append(Chunks(data, 1))
    return made


def _fastest(
    rows: int, columns: int, tokens: int, weights: list[Chunks], device: torch.device
) -> Entry:
    depth = weights[0].data.shape[1]
    x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16)
    codes = torch.empty(depth, tokens, layout.COLUMNS, dtype=torch.uint8, device=device)
    token_scale = torch.empty(tokens, device=device)
    tried = schedules.candidates(tokens, rows, columns)
    factor = torch.rand(weights[0].data.shape[0] * layout.ROWS, device=device)
    y = torch.empty(tokens, rows, dtype=torch.bfloat16, device=device)

    def fused(schedule: Schedule) -> Callable[[Chunks], None]:
        count = flag_count(schedule, tokens, (rows,), depth, device.index or 0)
        flags = torch.empty(count, dtype=torch.int32, device=device)

        def run(chunks: Chunks) -> None:
            quantize(x, None, [], [], codes, token_scale, None, flags)
            inputs = Inputs(codes, token_scale)
            multiply(inputs, [Matrix(chunks, factor, None, y)], schedule, flags)

        return run

    runs: dict[object, Callable[[Chunks], None]] = {schedule: fused(schedule) for schedule in tried}
    runs["expanded"] = _expanded(rows, columns, x, factor, device)
    # About a millisecond of calls in a graph.
    calls = max(2, min(48, int(4e11 / (2.0 * tokens * rows * columns))))
    times = _measure(runs, weights, calls)
    expanded = times.pop("expanded")
    best = min(times, key=lambda schedule: times[schedule])
    assert isinstance(best, Schedule)
    return Entry(rows, columns, tokens, best, round(times[best], 2), round(expanded, 2))


def _expanded(
    rows: int, columns: int, x: Tensor, factor: Tensor, device: torch.device
) -> Callable[[Chunks], None]:
    """The expanded path."""
    wide, deep = expanded.matrix_shape(rows, columns)
    matrix = torch.empty(wide, deep, dtype=torch.uint8, device=device)
    tokens = x.shape[0] + -x.shape[0] % expanded.ALIGNMENT
    codes = torch.zeros(tokens, deep, dtype=torch.uint8, device=device)
    scale = torch.ones(tokens, device=device)

    def run(chunks: Chunks) -> None:
        quantize(x, None, [], [], codes, scale, None, None)
        expand(chunks, matrix)
        expanded.product(
            codes.view(fp8.DTYPE), scale[:, None], matrix.view(fp8.DTYPE), factor[:wide], rows
        )

    return run


def _measure(
    runs: dict[object, Callable[[Chunks], None]], weights: list[Chunks], calls: int
) -> dict[object, float]:
    """Microseconds of a call, the median of interleaved replays."""
    graphs = {}
    for name, run in runs.items():
        turn = cycle(weights)
        run(next(turn))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run(next(turn))
        graph.replay()
        graphs[name] = graph
    times: dict[object, list[float]] = {name: [] for name in runs}
    for _ in range(REPLAYS):
        for name, graph in graphs.items():
            start, end = _event(), _event()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * MICROSECONDS / calls)
    return {name: median(values) for name, values in times.items()}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
