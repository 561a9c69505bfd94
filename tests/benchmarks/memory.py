"""Peak host memory of converting models that differ only in their number of blocks.

    python tests/benchmarks/memory.py [--blocks 4 32] [--recipe best]

Method: for each number of blocks a Llama with random weights is written to disk and converted in a
process of its own; what counts is that process's peak resident memory above what it had after its
imports. Linux only. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

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
    config.save_pretrained(folder)
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


def memory(field: str) -> int:
    """Resident memory of this process in bytes, now (VmRSS) or at its peak (VmHWM)."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def convert_here(source: str, out: str, recipe: str) -> None:
    """In a process of its own: convert, and print the peak before and after."""
    import zqfp_convert.conversion  # the imports are not what is measured

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    made = zqfp_convert.conversion.convert(
        source, out, recipe=recipe, device="cpu", samples=SAMPLES, seq_len=SEQ_LEN,
        calibration=f"{source}/text.txt" if recipe != "fast" else None,
    )  # fmt: skip
    print(
        json.dumps({"before": before, "after": memory("VmHWM"), "planned": made.plan.host_memory})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--here", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        convert_here(*given.here)
        return
    rows = []
    for blocks in given.blocks:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "model"
            source.mkdir()
            size = write_model(source, blocks, given.hidden)
            if given.recipe != "fast":
                copy_tokenizer(source)
            command = [sys.executable, __file__, "--here", str(source), f"{folder}/out"]
            done = subprocess.run(
                [*command, given.recipe], check=True, capture_output=True, text=True
            )
        measured = json.loads(done.stdout.splitlines()[-1])
        growth = measured["after"] - measured["before"]
        rows.append({"blocks": blocks, "bytes": size, "peak": growth, **measured})
    table = Table("blocks", "weights on disk", "peak memory above imports", box=None)
    for row in rows:
        table.add_row(
            str(row["blocks"]), f"{row['bytes'] / 1e6:.0f} MB", f"{row['peak'] / 1e6:.0f} MB"
        )
    Console().print(table)
    print(json.dumps({"machine": platform.machine(), "recipe": given.recipe, "rows": rows}))


def copy_tokenizer(folder: Path) -> None:
    """The demonstration model's tokenizer, and text to calibrate on."""
    demo = Path(zqfp_convert.__file__).parent / "demo" / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo / name).read_bytes())
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4000)


if __name__ == "__main__":
    main()
