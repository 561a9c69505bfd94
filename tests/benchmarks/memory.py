"""Peak host memory of converting models that differ only in their number of blocks.

    python tests/benchmarks/memory.py [--blocks 4 16 64] [--recipe fast best] [--hidden 2048 512]

Method: for each recipe, with a hidden size of its own, and each number of blocks, a Llama with
random weights is written to disk and converted on the CPU in a process of its own. That process
first converts a Llama of one block of width 128, so that all modules are imported and all libraries
have what they keep; what counts is the peak of resident memory above what the process has then, as
the conversion itself reports it, and beside it what the plan has estimated. Linux only. Prints a
table, with the peak over that of the fewest blocks, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import zqfp_convert

SAMPLES, SEQ_LEN = 8, 128


def write_model(folder: Path, blocks: int, hidden: int) -> int:
    """Write a Llama, block by block so that this costs no memory; returns the bytes of weights."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)  # makes the folder
    with torch.device("meta"):
        shapes = {
            k: v.shape for k, v in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    shards: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")
        shards.setdefault(part[2] if part[1] == "layers" else "rest", []).append(name)
    index, total = {}, 0
    for number, (_, names) in enumerate(sorted(shards.items())):
        tensors = {n: (torch.randn(shapes[n]) * 0.02).bfloat16() for n in names}
        save_file(tensors, folder / f"{number}.safetensors")
        index |= dict.fromkeys(names, f"{number}.safetensors")
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


def convert_here(small: str, source: str, out: str, recipe: str) -> None:
    """In a process of its own: convert, and print the peak and what was planned."""
    for model, folder in ((small, f"{out}.small"), (source, out)):
        made = zqfp_convert.convert(
            model, folder, recipe=recipe, device="cpu", samples=SAMPLES, seq_len=SEQ_LEN,
            calibration=f"{model}/text.txt" if recipe != "fast" else None,
        )  # fmt: skip
    print(
        json.dumps(
            {"peak": made.host_peak, "planned": made.plan.host_memory, "seconds": made.seconds}
        )
    )


def measured(recipe: str, blocks: int, hidden: int) -> dict[str, Any]:
    """The figures of one conversion."""
    with tempfile.TemporaryDirectory() as folder:
        small, source = Path(folder) / "small", Path(folder) / "model"
        write_model(small, 1, 128)
        size = write_model(source, blocks, hidden)
        for model in (small, source):
            copy_tokenizer(model)
        here = ["--here", str(small), str(source), f"{folder}/out", recipe]
        command = [sys.executable, __file__, *here]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {"recipe": recipe, "hidden": hidden, "blocks": blocks, "bytes": size, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--recipe", nargs="+", default=["fast", "best"])
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 512])
    parser.add_argument("--here", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        convert_here(*given.here)
        return
    rows = []
    names = (
        "recipe",
        "hidden",
        "blocks",
        "weights on disk",
        "peak above imports",
        "over the first",
    )
    table = Table(*names, "planned", "planned over peak", box=None)
    for recipe, hidden in zip(given.recipe, given.hidden, strict=True):
        first = None
        for blocks in given.blocks:
            row = measured(recipe, blocks, hidden)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
            peak, planned = row["peak"], row["planned"]
            first = first or peak
            table.add_row(
                recipe, str(hidden), str(blocks), f"{row['bytes'] / 1e6:.0f} MB",
                f"{peak / 1e6:.1f} MB", f"{peak / first:.3f}",
                f"{planned / 1e6:.1f} MB", f"{planned / peak:.2f}",
            )  # fmt: skip
    Console().print(table)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(json.dumps({"machine": machine, "rows": rows}))


def copy_tokenizer(folder: Path) -> None:
    """The demonstration model's tokenizer, and text to calibrate on."""
    demo = Path(zqfp_convert.__file__).parent / "demo" / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo / name).read_bytes())
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4000)


if __name__ == "__main__":
    main()
