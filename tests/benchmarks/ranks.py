"""How much faster several GPUs convert than one.

    python tests/benchmarks/ranks.py [--processes 1,2] [--layers 8] [--calibration TEXT.txt]

Method: a Llama with 8 B-like layers and random weights (as in `hopper.py`), converted by `torchrun
--nproc-per-node N` for each N, recipe `best`, text read and not written unless there is none. The
first conversion of all is of a small model, which compiles kernels and fills caches; the model's
files are read once before, so that all find them in the page cache. Prints wall times of the
command and of the conversion in it, peak memory of each process, and what the time went to in the
first one, as a table and a JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def convert(given: argparse.Namespace) -> None:
    """What torchrun starts: one process of a conversion."""
    import torch

    import zqfp_convert
    from zqfp_convert import parallel

    marks: list[tuple[float, str]] = []

    def mark(text: str, done: int, total: int) -> None:
        marks.append((time.monotonic(), text))

    with parallel.join(given.device) as world:
        began = time.monotonic()
        zqfp_convert.convert(
            given.model,
            given.out,
            recipe=given.recipe,
            calibration=given.calibration,
            samples=given.samples,
            seq_len=given.seq_len,
            progress=mark,
            device=world.device,
            world=world,
        )
        ended = time.monotonic()
        cuda = torch.cuda.is_available() and world.device != "cpu"
        peaks = world.gather(torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0)
        steps: dict[str, float] = defaultdict(float)
        for (start, text), (end, _) in itertools.pairwise([*marks, (ended, "")]):
            steps[text.split("  ")[-1] if text.startswith("block") else text.split(",")[0]] += (
                end - start
            )
        if world.leads:
            machine = torch.cuda.get_device_name() if cuda else "cpu"
            found = {
                "processes": world.size,
                "machine": machine,
                "torch": torch.__version__,
                "seconds": round(ended - began, 2),
                "peak_gb": [round(peak, 2) for peak in peaks],
                "steps": {text: round(seconds, 2) for text, seconds in steps.items()},
            }
            Path(given.result).write_text(json.dumps(found))


def run(processes: int, model: Path, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """A conversion by so many processes, each started by torchrun."""
    out, result = folder / f"out-{model.name}-{processes}", folder / "result.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), __file__, "--model", str(model)),
        *("--out", str(out), "--result", str(result), "--recipe", given.recipe),
        *("--samples", str(given.samples), "--seq-len", str(given.seq_len)),
    ]
    if given.calibration:
        command += ["--calibration", given.calibration]
    if given.device:
        command += ["--device", given.device]
    threads = max(1, (os.cpu_count() or 1) // max(given.processes))
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    began = time.monotonic()
    subprocess.run(
        command,
        check=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)},
    )
    found: dict[str, Any] = json.loads(result.read_text())
    found["command_seconds"] = round(time.monotonic() - began, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--calibration")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--device")
    for name in ("--model", "--out", "--result"):  # of one process
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.result:
        convert(given)
        return
    from hopper import write_model
    from rich.console import Console
    from rich.table import Table

    given.processes = [int(part) for part in given.processes.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, layers in (("small", 1), ("large", given.layers)):
            (folder / name).mkdir()
            write_model(folder / name, layers, given.hidden, given.device or "cuda")
        run(max(given.processes), folder / "small", folder, given)
        found = []
        for count in given.processes:
            found.append(run(count, folder / "large", folder, given))
            print(json.dumps(found[-1]), flush=True)  # a machine may go before all is done
    table = Table("processes", "seconds", "against the first", "command", "peak GB", box=None)
    for one in found:
        ratio = f"{found[0]['seconds'] / one['seconds']:.2f}"
        peaks = ", ".join(map(str, one["peak_gb"]))
        seconds, command = str(one["seconds"]), str(one["command_seconds"])
        table.add_row(str(one["processes"]), seconds, ratio, command, peaks)
    console = Console(width=110)
    console.print(table)
    steps = Table("step", *(f"{one['processes']}: seconds" for one in found), box=None)
    for text in found[0]["steps"]:
        steps.add_row(text, *(str(one["steps"].get(text, "-")) for one in found))
    console.print(steps)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
