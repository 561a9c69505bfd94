"""Perplexity and KL divergence to the original for recipes and scales, on text not calibrated on.

    python tests/benchmarks/accuracy.py MODEL --calibration C.txt --evaluation E.txt

Method: each recipe converts MODEL on --device (the CPU) with the same calibration windows; there
the packed model (reference path, float32) and the original (float32) read the first windows of the
evaluation text, non-overlapping, without special tokens. KL is the mean over tokens of
KL(original || packed), in nats. Folders of peer_weights.py, after --peers, are measured alike:
float32, the inputs of the linears in the decoder's blocks quantized to E4M3 for each token. Prints
a table, then one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import zqfp_convert
from zqfp_convert.calibration.simulated import SimulatedLinear
from zqfp_convert.evaluate.divergence import compare
from zqfp_convert.model.blocks import bias_of, find_blocks, linears, put, weight_matrix

CASES: dict[str, dict[str, Any]] = {
    "fast, M1": {"recipe": "fast", "scales": "m1", "scale_rounding": "ceil"},
    "fast, M2": {"recipe": "fast"},
    "paper, M1": {"recipe": "paper"},
    "paper, M2": {"recipe": "paper", "scales": "m2"},
    "paper, M1, group 128": {"recipe": "paper", "group_size": 128},
    "best, M1": {"recipe": "best", "scales": "m1"},
    "best, M2, E2M1": {"recipe": "best", "codebooks": "e2m1"},
    "best, M2, E2M1, rank 0": {"recipe": "best", "codebooks": "e2m1", "rank": 0},
    "best, M2": {"recipe": "best"},
    "best, M2, rank 0": {"recipe": "best", "rank": 0},
    "GPTQ, free scales": {
        "recipe": "paper",
        "scales": "free",
        "group_size": 128,
        "activation_order": True,
        "rank": 0,
    },
    "max, M2": {"recipe": "max"},
    "max, M2, rank 0": {"recipe": "max", "rank": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=32, help="evaluation windows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", choices=list(CASES), help="some cases, or none")
    parser.add_argument("--peers", nargs="+", type=Path, default=[], help="of peer_weights.py")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    cases = CASES if given.only is None else given.only
    subjects = {case: partial(converted, case, given) for case in cases}
    subjects |= {folder.name: partial(peer, folder) for folder in given.peers}
    if not subjects:
        parser.error("nothing to measure: neither cases nor --peers")

    original = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    original.to(given.device)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    text = given.evaluation.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = (
        torch.tensor(ids[: given.windows * given.seq_len]).view(-1, given.seq_len).to(given.device)
    )

    rows: dict[str, dict[str, float]] = {}
    for name, make in subjects.items():
        subject = make()
        measured = compare(original, subject.model.to(given.device), windows)
        rows[name] = {
            "bits": subject.bits,
            "perplexity": measured.perplexity,
            "kl": measured.kl,
            "same_top": measured.same_top,
            "seconds": subject.seconds,
        }
        baseline = measured.original_perplexity
        print(f"{name}: KL {measured.kl:.4f}, {subject.seconds:.0f} s", file=sys.stderr)
    show(given.model.name, baseline, rows)


@dataclass(frozen=True)
class Subject:
    """A quantized model, its bits a weight, and the seconds that quantizing it took."""

    model: PreTrainedModel
    bits: float
    seconds: float


def converted(case: str, given: argparse.Namespace) -> Subject:
    with tempfile.TemporaryDirectory() as folder:
        made = zqfp_convert.convert(
            given.model,
            Path(folder) / "out",
            calibration=given.calibration,
            samples=given.samples,
            seq_len=given.seq_len,
            seed=given.seed,
            device=given.device,
            **CASES[case],
        )
        packed = zqfp_convert.load(made.out, device="cpu", dtype=torch.float32)
    return Subject(packed, made.bits, made.seconds)


def peer(folder: Path) -> Subject:
    about = json.loads((folder / "peer.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for block in find_blocks(model).modules:
        for name, linear in list(linears(block)):
            put(block, name, SimulatedLinear(weight_matrix(linear), bias_of(linear)))
    return Subject(model, about["bits"], about["seconds"])


def show(model: str, baseline: float, rows: dict[str, dict[str, float]]) -> None:
    table = Table(title=f"{model}: original perplexity {baseline:.3f}", box=None)
    for heading in ("recipe", "bits a weight", "perplexity", "KL", "same top token", "seconds"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    for case, row in rows.items():
        table.add_row(
            case,
            f"{row['bits']:.2f}",
            f"{row['perplexity']:.3f}",
            f"{row['kl']:.4f}",
            f"{row['same_top']:.1%}",
            f"{row['seconds']:.0f}",
        )
    Console(width=100).print(table)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(json.dumps({"model": model, "machine": machine, "original": baseline, "rows": rows}))


if __name__ == "__main__":
    main()
