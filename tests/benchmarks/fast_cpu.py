"""`fast` on the CPU, against one plain torch pass over the same weights and a copy of the files.

    python tests/benchmarks/fast_cpu.py [--gigabytes 0.5 1 2] [--rounds 3] [--hidden 2048]

Method: a Llama with random bf16 weights is written block by block. In turn, each in a process of
its own, `--rounds` times: (a) every linear weight of the blocks is read and rounded in the plainest
way (largest magnitude of each group of 128, divided by it, nearest of the eight magnitudes by
`torch.bucketize`), row by row in slices, and the files are copied and flushed; (b) `fast` converts.
What counts is the median of each, and of the pairs' ratios. Peak anonymous memory (RssAnon, read
every 20 ms) above that after the imports is printed too. Linux only. Prints a table, then one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from memory import write_model
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
GROUP, ROWS = 128, 256


def plain(source: Path, out: Path) -> None:
    """One plain pass, and a copy of the files."""
    middle = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    out.mkdir()
    for shard in sorted(source.glob("*.safetensors")):
        with safe_open(str(shard), "pt") as file:
            for name in file.keys():  # noqa: SIM118
                weight = file.get_tensor(name)
                if weight.ndim != 2 or ".layers." not in name:
                    continue
                for rows in weight.split(ROWS):
                    groups = rows.float().view(len(rows), -1, GROUP)
                    scale = groups.abs().amax(-1, keepdim=True) / 6
                    torch.bucketize((groups / scale).abs(), middle)
    for file in source.iterdir():
        shutil.copyfile(file, out / file.name)
        handle = os.open(out / file.name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def anonymous() -> int:
    """Anonymous resident memory of this process, in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def here(way: str, source: Path, out: Path) -> None:
    """In a process of its own: one way, its seconds and its peak of anonymous memory."""
    import zqfp_convert.conversion  # the imports are not what is measured

    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    if way == "plain":
        plain(source, out)
    else:
        zqfp_convert.conversion.convert(source, out, recipe="fast", device="cpu")
    seconds = time.monotonic() - began
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "memory": max(0, peak[0] - before)}))


def measured(gigabytes: float, hidden: int, rounds: int) -> dict[str, Any]:
    """The figures for a model of about that size."""
    block = 2 * (3 * hidden**2 + 9 * hidden**2)  # about, in bytes
    found: dict[str, list[dict[str, float]]] = {"plain": [], "fast": []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        size = write_model(source, max(1, round(gigabytes * 1e9 / block)), hidden)
        for number in range(rounds):
            for way in found:
                out = Path(folder) / f"{way}{number}"
                command = [sys.executable, __file__, "--here", way, str(source), str(out)]
                run = subprocess.run(command, check=True, capture_output=True, text=True)
                found[way].append(json.loads(run.stdout.splitlines()[-1]))
                shutil.rmtree(out)
    pairs = zip(found["fast"], found["plain"], strict=True)
    ratio = statistics.median(fast["seconds"] / one["seconds"] for fast, one in pairs)
    return {"bytes": size, "ratio": ratio, "runs": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[2.0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--here", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        here(options.here[0], Path(options.here[1]), Path(options.here[2]))
        return
    table = Table("weights", "way", "seconds", "over the plain pass", "anonymous memory", box=None)
    rows = [measured(size, options.hidden, options.rounds) for size in options.gigabytes]
    for row in rows:
        for way, runs in row["runs"].items():
            seconds = statistics.median(run["seconds"] for run in runs)
            memory = max(run["memory"] for run in runs) / 1e6
            ratio = f"{row['ratio']:.2f}" if way == "fast" else ""
            weights = f"{row['bytes'] / 1e9:.2f} GB"
            table.add_row(weights, way, f"{seconds:.1f}", ratio, f"{memory:.0f} MB")
    Console().print(table)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(json.dumps({"machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
