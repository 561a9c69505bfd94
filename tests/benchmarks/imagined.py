"""What one process of several takes for a block, where there is one GPU and no other process.

    python tests/benchmarks/imagined.py [--processes 1,2] [--layers 6] [--calibration TEXT.txt]

Method: a Llama with 8 B-like layers and random weights (as in `hopper.py`), converted with recipe
`best` by process 0 of each number of processes, by turns, after a first conversion that compiles
kernels. The others are imagined: sums are multiplied, the rows of others are copies of its own. So
nothing waits for anybody and nothing is sent, and what comes out is no model; time and launches are
those of such a process. Prints the median seconds of a block from the fourth on (one of those
before waits for what lies outside the blocks to be written), and what would be exchanged in the
fourth, as a table and a JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from hopper import write_model
from rich.console import Console
from rich.table import Table
from torch import Tensor

import zqfp_convert
from zqfp_convert.checkpoint.output.series import Series
from zqfp_convert.parallel import ALONE, Share, World

T = TypeVar("T")
BLOCK = re.compile(r"block (\d+)/")

calls: dict[str, int] = defaultdict(int)
sent: dict[str, int] = defaultdict(int)


class Imagined(World):
    """A world of which this process is all that there is."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """As if all had the same."""
        calls["sums"] += 1
        sent["sums"] += tensor.nbytes
        return tensor.mul_(self.size)

    def send_(self, tensor: Tensor, source: int) -> Tensor:
        """Others' tensors are what is there."""
        calls["rows"] += 1
        sent["rows"] += tensor.nbytes
        if source != self.rank:
            raise AssertionError("only the first one can be imagined to send")
        return tensor

    def total(self, value: float) -> float:
        """As if all had the same."""
        calls["values"] += 1
        return float(value) * self.size

    def gather(self, value: T) -> list[T]:
        """As if all had the same."""
        calls["values"] += 1
        return [value] * self.size

    def broadcast(self, value: T, source: int = 0) -> T:
        """This one's."""
        calls["values"] += 1
        return value

    def _found(self, find: Callable[[], T]) -> list[T]:
        return self.gather(find())


def complete_(share: Share, whole: Tensor) -> Tensor:
    """Every other process's rows are this one's."""
    own = whole[share.here]
    for rank in range(1, share.world.size):
        part = whole[share.world.part(share.total, rank)]
        part.copy_(own[: len(part)])
        calls["rows"] += 1
        sent["rows"] += part.nbytes
    return whole


def converted(model: Path, out: Path, processes: int, given: argparse.Namespace) -> dict[str, Any]:
    """A conversion by one of so many processes: seconds of each block, exchanges of the fourth."""
    world = ALONE if processes == 1 else Imagined(0, processes, 0, processes, given.device)
    begun: dict[int, tuple[float, dict[str, int], dict[str, int]]] = {}

    def mark(text: str, done: int, total: int) -> None:
        if (block := BLOCK.match(text)) and int(block[1]) not in begun:
            begun[int(block[1])] = time.monotonic(), dict(calls), dict(sent)

    zqfp_convert.convert(
        model, out, recipe="best", calibration=given.calibration, samples=given.samples,
        seq_len=given.seq_len, device=given.device, world=world, progress=mark, overwrite=True,
    )  # fmt: skip
    times = [begun[block][0] for block in sorted(begun)]
    (_, before, bytes_before), (_, after, bytes_after) = begun[4], begun[5]
    return {
        "processes": processes,
        "blocks": [round(b - a, 3) for a, b in itertools.pairwise(times)],
        "calls": {kind: count - before.get(kind, 0) for kind, count in after.items()},
        "megabytes": {k: round((n - bytes_before.get(k, 0)) / 1e6) for k, n in bytes_after.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--calibration")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda:0")
    given = parser.parse_args()
    if given.layers < 5:
        parser.error("--layers: at least 5, as the first three do not count")
    if given.hidden < 512:
        parser.error("--hidden: at least 512, for a head of keys and values")
    Share.complete_ = complete_  # type: ignore[method-assign]
    real = Series.__init__

    def alone(self: Series, *args: Any, shared: bool = True) -> None:
        real(self, *args, shared=False)  # there is nobody else to write a file

    Series.__init__ = alone  # type: ignore[method-assign, assignment]
    counts = [int(part) for part in given.processes.split(",")]
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        model, out = Path(temporary) / "model", Path(temporary) / "out"
        model.mkdir()
        write_model(model, given.layers, given.hidden, given.device)
        converted(model, out, counts[0], given)
        for _ in range(given.rounds):
            for count in counts:
                found[count].append(converted(model, out, count, given))
    table = Table("processes", "seconds a block", "against the first", "exchanged", box=None)
    medians = {
        count: statistics.median(t for one in runs for t in one["blocks"][3:])
        for count, runs in found.items()
    }
    for count, seconds in medians.items():
        last = found[count][-1]
        exchanged = [f"{n} {kind}" for kind, n in last["calls"].items() if n]
        exchanged += [f"{size} MB of {kind}" for kind, size in last["megabytes"].items() if size]
        ratio = f"{medians[counts[0]] / seconds:.2f}"
        table.add_row(str(count), f"{seconds:.3f}", ratio, ", ".join(exchanged))
    Console(width=140).print(table)
    machine = torch.cuda.get_device_name() if given.device.startswith("cuda") else "cpu"
    print(json.dumps({"machine": machine, "torch": torch.__version__, "runs": dict(found)}))


if __name__ == "__main__":
    main()
