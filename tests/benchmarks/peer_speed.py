"""How long a layer of 8 B-like shape takes on a GPU, beside llm-compressor's GPTQ.

    python tests/benchmarks/peer_speed.py --calibration TEXT.txt [--layers 5]

Method: the model of `hopper.py` and the same windows of text for both, each in a process of its
own: this project's recipe `best` (FP4 under M2, FP8 activations, rank 8, quantized blocks feed
later ones) and llm-compressor's GPTQModifier with its defaults (INT4, groups of 128, sequential).
A layer's time is the mean between the beginnings of two layers, the first and the last layer left
out, which have other work in them; for llm-compressor a layer begins when it is first called. Needs
`pip install . llmcompressor==0.14.0.1`. Prints a table and a JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hopper import write_model
from rich.console import Console
from rich.table import Table


def ours(given: argparse.Namespace) -> dict[str, float]:
    """When each block began."""
    import zqfp_convert

    begins: dict[str, float] = {}

    def mark(text: str, done: int, total: int) -> None:
        found = re.match(r"block (\d+)/", text)
        if found:
            begins.setdefault(found[1], time.monotonic())

    zqfp_convert.convert(
        given.folder / "model",
        given.folder / "out",
        calibration=given.calibration,
        samples=given.samples,
        seq_len=given.seq_len,
        rotation="none",  # its rehearsal is no time of a layer
        device="cuda",
        progress=mark,
    )
    return begins


def llmcompressor(given: argparse.Namespace) -> dict[str, float]:
    """When each layer was first called."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from zqfp_convert.calibration.text import Text, windows

    begins: dict[str, float] = {}
    whole = torch.ones(given.seq_len, dtype=torch.int64)
    model = AutoModelForCausalLM.from_pretrained(given.folder / "model", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(given.folder / "model")
    ids = windows(Text.named(given.calibration), tokenizer, given.samples, given.seq_len, 0)
    for index, layer in enumerate(model.model.layers):

        def began(*_: object, name: str = str(index)) -> None:
            begins.setdefault(name, time.monotonic())

        layer.register_forward_pre_hook(began)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=DataLoader([{"input_ids": one, "attention_mask": whole} for one in ids]),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
    )
    return begins


SIDES = {"zqfp-convert, best": ours, "llm-compressor, GPTQ INT4": llmcompressor}


def run(side: str, given: argparse.Namespace) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(given.folder)]
    command += ["--calibration", str(given.calibration), "--samples", str(given.samples)]
    subprocess.run([*command, "--seq-len", str(given.seq_len)], check=True)
    found: dict[str, Any] = json.loads((given.folder / "result.json").read_text())
    return found


def measured(given: argparse.Namespace) -> None:
    """What that process does."""
    began = time.monotonic()
    begins = sorted(SIDES[given.side](given).values())
    steps = [later - earlier for earlier, later in itertools.pairwise(begins[1:])]
    found = {
        "side": given.side,
        "a layer": round(statistics.mean(steps), 2),
        "whole": round(time.monotonic() - began, 1),
        "gpu peak, GB": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "steps": [round(step, 2) for step in steps],
    }
    (given.folder / "result.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        measured(given)
        return
    with tempfile.TemporaryDirectory() as temporary:
        given.folder = Path(temporary)
        (given.folder / "model").mkdir()
        write_model(given.folder / "model", given.layers, 4096, "cuda")
        torch.cuda.empty_cache()
        found = []
        for side in SIDES:
            found.append(run(side, given))
            print(json.dumps(found[-1]), flush=True)
    table = Table("", "seconds a layer", "times as long", "peak GPU memory, GB", box=None)
    for one in found:
        times = f"{one['a layer'] / found[0]['a layer']:.1f}"
        table.add_row(one["side"], str(one["a layer"]), times, str(one["gpu peak, GB"]))
    Console(width=100).print(torch.cuda.get_device_name(), f"torch {torch.__version__}", table)


if __name__ == "__main__":
    main()
