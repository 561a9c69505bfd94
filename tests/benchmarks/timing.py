"""Times of GPU work: graphs of many calls on weights no cache holds, replayed in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

CALLS = 24  # in one graph, at least
ROTATED = 200_000_000  # bytes of weights to go through before one is used again: 4 L2 caches
FLUSHED = 1 << 28  # bytes written before a replay, so that each finds the same L2 cache


def copies(size: int) -> int:
    """How many copies of a weight of that many bytes never meet themselves in the L2 cache."""
    return max(2, -(-ROTATED // size))


class Replay:
    """A CUDA graph that calls `call(0), call(1), ...`, each copy of the weights equally often."""

    def __init__(self, call: Callable[[int], object], copies: int, calls: int = CALLS) -> None:
        self.calls = -(-calls // copies) * copies
        for copy in range(min(3, copies)):
            call(copy)  # compiles, tunes, loads
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for number in range(self.calls):
                call(number % copies)
        self.graph.replay()
        torch.cuda.synchronize()


def medians(replays: Mapping[str, Replay], rounds: int = 7) -> dict[str, float]:
    """Microseconds of a call, the median over the rounds; in a round each graph has its turn.

    Nothing waits in between: the write that flushes the cache also gives the host the time to put
    the graph and both events in the queue, so that no launch is measured.
    """
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in replays}
    for _ in range(rounds):
        for name, replay in replays.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.fill_(1)
            begin.record()
            replay.graph.replay()
            end.record()
            events[name].append((begin, end))
        torch.cuda.synchronize()
    return {
        name: statistics.median(a.elapsed_time(b) for a, b in pairs) * 1e3 / replays[name].calls
        for name, pairs in events.items()
    }


def bandwidths(elements: int = 1 << 30) -> dict[str, float]:
    """Bytes a second of a copy (read plus written) and of a pure read, by tensors of 4 GB."""
    source = torch.randn(elements, device="cuda")
    target = torch.empty_like(source)
    replays = {
        "copy": Replay(lambda _: target.copy_(source), 1, 4),
        "read": Replay(lambda _: source.sum(), 1, 4),
    }
    times = medians(replays)
    return {
        "copy": 2 * source.nbytes / times["copy"] * 1e6,
        "read": source.nbytes / times["read"] * 1e6,
    }
