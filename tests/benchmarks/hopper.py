"""Converts a Llama with 8 B-like layers on a GPU, loads it, and compares its two paths.

    python tests/benchmarks/hopper.py [--layers 4] [--calibration TEXT] [--only-convert]

Method: random weights (hidden 4096, intermediate 14336, GQA 32/8, 128256 tokens), recipe `best`;
wall time of the whole conversion, its peak of GPU memory, and of host memory above what imports
take, in a process of its own, step by step; then each quantized linear on the same inputs,
expanded against reference path, and the logits of the whole model by either path. A difference in
a bfloat16 output flips E4M3 roundings behind it, and random weights pass that on undamped; so
there is a control: the reference path with noise of the size of the linears' difference on every
linear's output. Last the trained demonstration model: its divergence from the original by either
path. Prints tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import zqfp_convert
from zqfp_convert.calibration.text import generate
from zqfp_convert.conversion.probe import estimate
from zqfp_convert.evaluate.divergence import compare
from zqfp_convert.runtime.linear import PATH_VARIABLE, QuantizedLinear

STEP = re.compile(r"block \d+/\d+")
DEMO = Path(zqfp_convert.__file__).parent / "demo" / "model"


def write_model(folder: Path, layers: int, hidden: int, device: str) -> None:
    """A Llama with random weights, one shard for each block, and a tokenizer to read text with."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        max_position_embeddings=8192,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    with torch.device("meta"):
        places = AutoModelForCausalLM.from_config(config).state_dict()
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    torch.manual_seed(0)
    for name, place in places.items():
        value = torch.randn(place.shape, device=device) * hidden**-0.5
        value = torch.ones_like(value) if name.endswith("norm.weight") else value
        path = name.split(".")
        parts[path[2] if path[1] == "layers" else "rest"][name] = value.bfloat16().cpu()
    index = {}
    for part, tensors in parts.items():
        save_file(tensors, folder / f"{part}.safetensors")
        index |= dict.fromkeys(tensors, f"{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def relative(have: torch.Tensor, want: torch.Tensor) -> float:
    return float((have.float() - want.float()).norm() / want.float().norm())


def by_path(path: str, run: torch.nn.Module, *args: torch.Tensor) -> torch.Tensor:
    os.environ[PATH_VARIABLE] = path
    try:
        out = run(*args)
    finally:
        del os.environ[PATH_VARIABLE]
    return out if isinstance(out, torch.Tensor) else out.logits


def noisy(model: torch.nn.Module, share: float, ids: torch.Tensor) -> torch.Tensor:
    """Logits by the reference path with relative noise on the output of every packed linear."""

    def disturb(module: torch.nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(out.float()) * out.float().square().mean().sqrt()
        return (out.float() + share * noise).to(out.dtype)

    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    handles = [module.register_forward_hook(disturb) for module in packed]
    logits = by_path("reference", model, ids)
    for handle in handles:
        handle.remove()
    return logits


def trained(device: str, paths: tuple[str, str]) -> dict[str, float]:
    """KL to the original of the demonstration model in bfloat16, by either path."""
    original = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).to(device).eval()
    windows = generate(original, 32, 256, 12345)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        zqfp_convert.convert(DEMO, out, samples=64, seq_len=256, device=device)
        packed = zqfp_convert.load(out, device=device)
        for path in paths:
            os.environ[PATH_VARIABLE] = path
            result[path] = compare(original, packed, windows).kl
            del os.environ[PATH_VARIABLE]
    return result


def convert(given: argparse.Namespace) -> None:
    """What a process of its own does: a conversion, and what it took."""
    cuda = given.device.startswith("cuda")
    steps: dict[str, list[float]] = {}  # seconds and the peak of GPU memory, in GB
    marks: list[tuple[float, str]] = []

    def end() -> None:
        if marks:
            step = steps.setdefault(marks[-1][1], [0.0, 0.0])
            step[0] += time.monotonic() - marks[-1][0]
            step[1] = max(step[1], torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0)
            if cuda:
                torch.cuda.reset_peak_memory_stats()

    def mark(text: str, done: int, total: int) -> None:
        end()
        marks.append((time.monotonic(), STEP.sub("block", text)))
        print(f"{time.monotonic() - began:7.2f} s  {text}", file=sys.stderr, flush=True)

    began = time.monotonic()
    made = zqfp_convert.convert(
        given.folder / "model",
        given.folder / "out",
        recipe=given.recipe,
        calibration=given.calibration,
        samples=given.samples,
        seq_len=given.seq_len,
        device=given.device,
        progress=mark,
    )
    end()
    seconds = time.monotonic() - began
    found = {
        "machine": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "layers": given.layers,
        "recipe": given.recipe,
        "samples": given.samples,
        "seq_len": given.seq_len,
        "seconds": round(seconds, 1),
        "estimated_seconds": round(estimate(made.plan).seconds, 1),
        "gpu_peak_gb": round(max(peak for _, peak in steps.values()), 2),
        "gpu_planned_gb": round(made.plan.device_memory / 1e9, 2),
        "host_peak_gb": round((made.host_peak or 0) / 1e9, 2),
        "host_planned_gb": round(made.plan.host_memory / 1e9, 2),
        "bits": round(made.bits, 3),
        "worst": dict(made.worst(3)),
        "steps": {text: [round(value, 2) for value in step] for text, step in steps.items()},
    }
    (given.folder / "result.json").write_text(json.dumps(found))


def converted(folder: Path) -> dict[str, Any]:
    """Convert in a process of its own, so that its memory is its own."""
    command = [sys.executable, __file__, "--folder", str(folder), *sys.argv[1:]]
    subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    table = Table("step", "seconds", "peak GPU memory, GB", box=None)
    for text, (seconds, peak) in found["steps"].items():
        table.add_row(text, f"{seconds:.2f}", f"{peak:.2f}")
    console = Console(width=100)
    console.print(table)
    console.print({key: value for key, value in found.items() if key not in ("steps", "worst")})
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only-convert", action="store_true", help="and compare no paths")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the conversion alone
    given = parser.parse_args()
    if given.folder:
        convert(given)
        return
    cuda = given.device.startswith("cuda")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "model").mkdir()
        write_model(folder / "model", given.layers, given.hidden, given.device)
        if cuda:
            torch.cuda.empty_cache()
        result = converted(folder)
        if given.only_convert:
            print(json.dumps(result))
            return
        began = time.monotonic()
        model = zqfp_convert.load(folder / "out", device=given.device)
        load_seconds = time.monotonic() - began

    paths = ("expanded", "reference") if cuda else ("reference", "reference")
    table = Table("layer", "M", "expanded against reference", box=None)
    linears: dict[str, dict[int, float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and ".layers.0." in name:
            linears[name] = {}
            for tokens in (1, 17, 512):
                x = torch.randn(tokens, module.in_features, device=given.device).bfloat16()
                have, want = (by_path(path, module, x) for path in paths)
                linears[name][tokens] = relative(have, want)
                table.add_row(name, str(tokens), f"{linears[name][tokens]:.2e}")
    ids = torch.randint(1000, (2, 256), device=given.device)
    logits = [by_path(path, model, ids) for path in paths]
    whole = relative(logits[0], logits[1])
    same_top = float((logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean())
    generated = model.generate(ids[:1, :16], max_new_tokens=16, do_sample=False)
    console = Console(width=100)
    console.print(table)
    control = relative(noisy(model, max(max(e.values()) for e in linears.values()), ids), logits[1])
    divergence = trained(given.device, paths)
    result |= {
        "load_seconds": round(load_seconds, 1),
        "logits": whole,
        "logits_control": control,
        "trained_kl": divergence,
        "same_top": same_top,
        "generated": generated.shape[1],
        "linears": linears,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
