"""Measures schedules on the GPU at hand, to make a table of the fastest."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import cycle
from statistics import median

import torch
from torch import Tensor

from zqfp_convert.numerics import fp8
from zqfp_convert.runtime import expanded
from zqfp_convert.runtime.kernels.hopper import decode, layout, schedules
from zqfp_convert.runtime.kernels.hopper.driver import Kernel
from zqfp_convert.runtime.kernels.hopper.expand import expand
from zqfp_convert.runtime.kernels.hopper.fused import Room, room_to_decode, room_to_multiply
from zqfp_convert.runtime.kernels.hopper.layout import Chunks
from zqfp_convert.runtime.kernels.hopper.multiply import FEW_TOKENS, Matrix, Schedule
from zqfp_convert.runtime.kernels.hopper.quantize import quantize
from zqfp_convert.runtime.kernels.hopper.schedules import Entry

TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
COLD = 200 << 20  # bytes of weights in turn, so that none are still in the L2 cache
REPLAYS = 5
PAUSE = 4000  # cycles, two microseconds, before each product for few tokens
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
    factor = torch.rand(weights[0].data.shape[0] * layout.ROWS, device=device)
    y = torch.empty(tokens, rows, dtype=torch.bfloat16, device=device)

    def fused(room: Room) -> Callable[[Chunks], None]:
        def run(chunks: Chunks) -> None:
            room.fill(x, None, ([], []))
            room.multiply([Matrix(chunks, factor, None, y)])

        return run

    runs: dict[object, Callable[[Chunks], None]] = {}
    for schedule in schedules.candidates(tokens, rows, columns):
        runs[schedule] = fused(room_to_multiply(tokens, (rows,), depth, 0, schedule, device))
    if decode.fits(tokens, (rows,), depth, (0,), device.index or 0):
        runs["decoded"] = fused(room_to_decode(tokens, depth, 0, device))
    runs["expanded"] = _expanded(rows, columns, x, factor, device)
    # About a millisecond of calls in a graph.
    calls = max(2, min(48, int(4e11 / (2.0 * tokens * rows * columns))))
    times = _measure(runs, weights, calls, PAUSE if tokens <= FEW_TOKENS else 0)
    other = {name: round(times.pop(name), 2) for name in ("expanded", "decoded") if name in times}
    best = min(times, key=lambda schedule: times[schedule])
    assert isinstance(best, Schedule)
    return Entry(rows, columns, tokens, best, round(times[best], 2), **other)


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
    runs: Mapping[object, Callable[[Chunks], None]],
    weights: list[Chunks],
    calls: int,
    pause: int,
) -> dict[object, float]:
    """Microseconds of a call, the median of interleaved replays; before each a pause, in cycles."""
    idle = _idle(torch.cuda.current_device()) if pause else None
    graphs = {}
    for name, run in {None: lambda chunks: None, **runs}.items() if pause else runs.items():
        turn = cycle(weights)
        run(next(turn))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                if idle is not None:
                    idle.launch(_Pause(pause), (1, 1), 32)
                run(next(turn))
        graph.replay()
        graphs[name] = graph
    times: dict[object, list[float]] = {name: [] for name in graphs}
    for _ in range(REPLAYS):
        for name, graph in graphs.items():
            start, end = _event(), _event()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * MICROSECONDS / calls)
    alone = median(times.pop(None)) if pause else 0.0
    return {name: median(values) - alone for name, values in times.items()}


class _Pause(ctypes.Structure):
    _fields_ = (("cycles", ctypes.c_longlong),)


@cache
def _idle(device: int) -> Kernel:
    return Kernel("pause", {})


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
