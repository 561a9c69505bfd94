"""Times of the products with a weight of Llama-3.1-8B, ours beside those of others, on one GPU.

    python tests/benchmarks/kernels.py [--quick] [--json PATH] [--shapes 4096x14336 ...]
        [--tokens 1 16 ...] [--contenders bf16 fp8 humming humming-tuned ours pair] [--rank 0 8]
        [--with-quantization]

Method: for each weight shape `N x K` and each number of tokens M, every contender becomes a CUDA
graph of 24 calls or more, which goes round so many copies of its weight (200 MB or more) that none
is still in the L2 cache; the graphs are replayed in turn, seven rounds, and the median counts.
Random data. `humming` is humming-kernels with the tile that it chooses, `humming-tuned` the fastest
of many of its tiles. The products of `humming` and `ours` take activations that are FP8 already;
`--with-quantization` times them from bfloat16 too. `pair` is ours with a pair of codebooks. First
come the machine's own bandwidths, last the quantization of the activations alone. Columns: `/x` is
x's time over ours, `/best` that of the fastest of the others, `+q` humming's over ours with
quantization, `LoRC` ours with over without it, `TB/s` the rate of reading the weight, also as a
share of a pure read's. A contender that cannot run is named and left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from humming_peer import Humming, TunedHumming
from ours import Ours
from peers import Bf16, Fp8
from rich.console import Console
from rich.table import Table
from timing import CALLS, Replay, bandwidths, copies, medians

from zqfp_convert.numerics import codebook

SHAPES = ["6144x4096", "4096x4096", "28672x4096", "4096x14336"]
TOKENS = [1, 16, 64, 256, 1024, 4096, 8192]
CONTENDERS = {"bf16": Bf16, "fp8": Fp8, "humming": Humming, "humming-tuned": TunedHumming}
PEERS = ("bf16", "fp8", "humming", "humming-tuned")
SMALL = 64  # up to so many tokens it is the bytes of the weight that take the time
DONE = "+q"  # after a name: with the quantization of the activations
QUICK = {"shapes": ["4096x4096", "28672x4096"], "tokens": [1, 64, 1024], "rounds": 3}

console = Console(width=190)


class Run:
    """Everything measured, and what could not be."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.bandwidths: dict[str, float] = {}
        self.points: list[dict[str, Any]] = []
        self.quantization: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.absent: set[str] = set()  # contenders that cannot be made

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """The result of the work; None if it fails, which is printed and kept."""
        try:
            return work()
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.failures.append(f"{what}: {type(error).__name__}: {lines[0][:200]}")
            console.print(f"FAILED {self.failures[-1]}", markup=False)
            return None

    def contenders(self, rows: int, columns: int) -> dict[str, Any]:
        """Those that can be made for a weight, by name; ours once for each rank."""
        kinds: dict[str, Callable[[int], Any]] = {}
        for name in self.given.contenders:
            if name == "ours":
                for rank in self.given.rank:
                    kinds[f"ours-r{rank}"] = partial(Ours, rows, columns, rank=rank)
            elif name == "pair":
                kinds["ours-pair"] = partial(Ours, rows, columns, rank=0, books=codebook.PAIR)
            else:
                kinds[name] = partial(CONTENDERS[name], rows, columns)
        made = {}
        for name, make in kinds.items():
            if name in self.absent:
                continue
            count = copies(CONTENDERS.get(name, Ours).size(rows, columns))
            contender = self.attempt(f"{name} {rows}x{columns}", partial(make, count))
            if contender is None:
                self.absent.add(name)  # a reason that will not go away
            else:
                made[name] = contender, count
        return made

    def point(self, made: dict[str, Any], rows: int, columns: int, tokens: int) -> None:
        """Measure all contenders side by side."""
        replays: dict[str, Replay] = {}
        errors: dict[str, float] = {}
        tiles: dict[str, Any] = {}
        for name, (contender, count) in made.items():

            def ready(contender: Any = contender, count: int = count, name: str = name) -> Replay:
                contender.prepare(tokens)
                if hasattr(contender, "error"):
                    errors[name] = contender.error()
                return Replay(contender.multiply, count)

            where = f"{name} {rows}x{columns} M={tokens}"
            replay = self.attempt(where, ready)
            if replay is None:
                continue
            replays[name] = replay
            if hasattr(contender, "tile"):
                tiles[name] = {key: str(value) for key, value in contender.tile.items()}
            if self.given.with_quantization and hasattr(contender, "quantize_and_multiply"):
                both = partial(Replay, contender.quantize_and_multiply, count)
                replay = self.attempt(where + " with quantization", both)
                if replay is not None:
                    replays[name + DONE] = replay
        times = self.attempt(
            f"times {rows}x{columns} M={tokens}", lambda: medians(replays, self.given.rounds)
        )
        self.points.append(
            {
                "rows": rows,
                "columns": columns,
                "tokens": tokens,
                "us": times or {},
                "errors": errors,
                "weight_bytes": {name: pair[0].weight_bytes for name, pair in made.items()},
                "tiles": tiles,
            }
        )

    def quantize(self, made: dict[str, Any], columns: int) -> None:
        """The quantization of the activations alone."""
        kinds = {name: pair[0] for name, pair in made.items() if hasattr(pair[0], "quantize")}
        kinds = {n: c for n, c in kinds.items() if n in ("humming", f"ours-r{self.given.rank[0]}")}
        for tokens in self.given.tokens:
            replays = {}
            for name, contender in kinds.items():
                where = f"{name} K={columns} M={tokens} quantization"

                def ready(contender: Any = contender, tokens: int = tokens) -> Replay:
                    contender.prepare(tokens)
                    return Replay(lambda _: contender.quantize(), 1, CALLS)

                replay = self.attempt(where, ready)
                if replay is not None:
                    replays[name] = replay
            if replays:
                times = medians(replays, self.given.rounds)
                self.quantization.append({"columns": columns, "tokens": tokens, "us": times})

    def write(self) -> None:
        if self.given.json is None:
            return
        result = {
            "machine": torch.cuda.get_device_name(),
            "versions": versions(("torch", "triton", "humming-kernels")),
            "python": platform.python_version(),
            "bandwidths": self.bandwidths,
            "points": self.points,
            "quantization": self.quantization,
            "failures": self.failures,
        }
        self.given.json.write_text(json.dumps(result, indent=1))


def versions(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def subject(run: Run) -> str:
    """Whose ratios are shown: ours without LoRC, or with it, else humming's."""
    ours = [f"ours-r{rank}" for rank in run.given.rank]
    measured = {name for point in run.points for name in point["us"]}
    return next((name for name in [*ours, "humming"] if name in measured), "")


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def ratio(times: dict[str, float], over: str, under: str) -> float | None:
    return times[over] / times[under] if over in times and under in times else None


def whole(times: dict[str, float], about: str) -> float | None:
    """How much faster than humming's way from bfloat16, which makes two launches."""
    return ratio(times, "humming" + DONE, about + DONE) if about != "humming" else None


def lorc_cost(times: dict[str, float], ranks: list[int]) -> float | None:
    return ratio(times, f"ours-r{ranks[-1]}", f"ours-r{ranks[0]}") if len(ranks) > 1 else None


def show(run: Run) -> None:
    """One table of all points, then the geometric means of the ratios."""
    about = subject(run)
    names = list(dict.fromkeys(name for point in run.points for name in point["us"]))
    peers = [peer for peer in PEERS if peer in names and peer != about]
    table = Table(box=None, title=f"microseconds; then how much faster {about} is")
    table.add_column("N x K", no_wrap=True)
    ratios = [*(f"/{peer}" for peer in peers), "/best", "+q", "LoRC"]
    for heading in ("M", *names, *ratios, "TB/s", "of read", "error"):
        table.add_column(heading, justify="right")
    before = None
    for point in run.points:
        times, shape = point["us"], f"{point['rows']} x {point['columns']}"
        rate = None
        if point["tokens"] <= SMALL and about in point["weight_bytes"] and about in times:
            rate = point["weight_bytes"][about] / times[about] * 1e6
        row = [number(times.get(name), ".1f") for name in names]
        row += [number(ratio(times, peer, about), ".2f") for peer in peers]
        row += [
            number(best(times, peers, about), ".2f"),
            number(whole(times, about), ".2f"),
            number(lorc_cost(times, run.given.rank), ".3f"),
            number(rate and rate / 1e12, ".2f"),
            number(rate and rate / run.bandwidths["read"], ".0%"),
            number(point["errors"].get(about), ".1e"),
        ]
        table.add_row("" if shape == before else shape, str(point["tokens"]), *row)
        before = shape
    console.print(table)
    classes = {
        f"M <= {SMALL}": [p for p in run.points if p["tokens"] <= SMALL],
        f"M > {SMALL}": [p for p in run.points if p["tokens"] > SMALL],
        "all": run.points,
    }
    means = Table("geometric mean", *ratios, box=None)
    for name, points in classes.items():
        columns = [[ratio(p["us"], peer, about) for p in points] for peer in peers]
        columns.append([best(p["us"], peers, about) for p in points])
        columns.append([whole(p["us"], about) for p in points])
        columns.append([lorc_cost(p["us"], run.given.rank) for p in points])
        means.add_row(name, *(number(mean(column), ".3f") for column in columns))
    console.print(means)
    if run.quantization:
        shown = list(dict.fromkeys(name for entry in run.quantization for name in entry["us"]))
        table = Table("K", "M", *shown, box=None, title="quantization alone, microseconds")
        for entry in run.quantization:
            cells = [number(entry["us"].get(name), ".2f") for name in shown]
            table.add_row(str(entry["columns"]), str(entry["tokens"]), *cells)
        console.print(table)
    for failure in run.failures:
        console.print(f"left out: {failure}", markup=False)


def best(times: dict[str, float], peers: list[str], about: str) -> float | None:
    """How much faster than the fastest of the peers."""
    present = [times[peer] for peer in peers if peer in times]
    return min(present) / times[about] if present and about in times else None


def mean(values: list[float | None]) -> float | None:
    present = [math.log(value) for value in values if value is not None]
    return math.exp(sum(present) / len(present)) if present else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M")
    parser.add_argument(
        "--contenders", nargs="+", choices=[*CONTENDERS, "ours", "pair"],
        default=["bf16", "fp8", "humming", "ours"],
    )  # fmt: skip
    parser.add_argument("--rank", nargs="+", type=int, default=[0, 8], help="of LoRC, for ours")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--with-quantization", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, tokens and rounds")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    usual = QUICK if given.quick else {"shapes": SHAPES, "tokens": TOKENS, "rounds": 7}
    for name, value in usual.items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    given.tokens = sorted(given.tokens)
    return given


@torch.inference_mode()
def main() -> None:
    given = parse()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        sys.exit("kernels.py measures FP8 kernels: it needs an NVIDIA GPU of capability 8.9 or up")
    torch.manual_seed(0)
    run = Run(given)
    began = time.monotonic()
    run.bandwidths = bandwidths()
    torch.cuda.empty_cache()
    rates = {name: f"{value / 1e12:.2f} TB/s" for name, value in run.bandwidths.items()}
    console.print(torch.cuda.get_device_name(), versions(("torch", "triton")), rates)
    if "humming" in given.contenders or "humming-tuned" in given.contenders:
        check = run.attempt("humming check", check_humming)
        console.print(f"humming against float32, 512 x 1024, M = 32: relative error {check}")
    quantized = set()
    for shape in given.shapes:
        rows, columns = (int(extent) for extent in shape.lower().split("x"))
        made = run.contenders(rows, columns)
        for name, (contender, _) in made.items():
            if hasattr(contender, "announce"):
                run.attempt(f"{name} {shape}", partial(contender.announce, given.tokens))
        for tokens in given.tokens:
            run.point(made, rows, columns, tokens)
            times = {name: round(value, 1) for name, value in run.points[-1]["us"].items()}
            seconds = time.monotonic() - began
            console.print(f"{seconds:5.0f} s  {shape} M={tokens} {times}", highlight=False)
        if columns not in quantized:
            run.attempt(f"quantization K={columns}", partial(run.quantize, made, columns))
            quantized.add(columns)
        del made
        torch.cuda.empty_cache()
        run.write()
    show(run)
    console.print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def check_humming() -> float:
    """That the call computes the product it is meant to."""
    contender = Humming(512, 1024, 1)
    contender.prepare(32)
    error = contender.error()
    assert error < 0.01, f"relative error {error}"
    return error


if __name__ == "__main__":
    main()
