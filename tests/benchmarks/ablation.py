"""What each part of the recipe `best` is worth: KL without it, several models and seeds.

    python tests/benchmarks/ablation.py MODEL... --calibration C.txt --evaluation E.txt

Method: as accuracy.py. Each row changes one thing of `best` at rank 0 (of `best`, where it is about
low-rank compensation); each seed picks other calibration windows of the same text. Prints for each
model the mean KL of the seeds, how far they are apart, the ratio to `best` (above 1 the part is
worth having), and the bits a weight. Then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import zqfp_convert
from zqfp_convert.evaluate.divergence import compare

Figures = dict[str, dict[str, list[tuple[float, float]]]]  # model, case: KL and bits of each seed

BARE, WHOLE = "best, rank 0", "best"
CASES: dict[str, dict[str, Any]] = {
    BARE: {"rank": 0},
    "rounding instead of GPTQ": {"rank": 0, "solver": "round", "sweeps": 0},
    "columns in their own order": {"rank": 0, "activation_order": False},
    "no coordinate descent": {"rank": 0, "sweeps": 0},
    "6 sweeps of it": {"rank": 0, "sweeps": 6},
    "target: the quantized prefix's output": {"rank": 0, "asymmetry": 0.0},
    "target: the original's output": {"rank": 0, "asymmetry": 1.0},
    "norms not centred": {"rank": 0, "center_norms": False},
    "residual stream as it is": {"rank": 0, "rotation": "none"},
    "residual stream rotated": {"rank": 0, "rotation": "residual"},
    "norms not balanced": {"rank": 0, "balance_norms": False, "rotation": "none"},
    "scales that never clip": {"rank": 0, "scale_rounding": "floor"},
    "scales m1": {"rank": 0, "scales": "m1"},
    "free scales": {"rank": 0, "scales": "free"},
    "groups of 32": {"rank": 0, "group_size": 32},
    "one codebook, E2M1": {"rank": 0, "codebooks": "e2m1"},
    "a pair of codebooks": {"rank": 0, "codebooks": "pair"},
    "rank auto": {"rank": "auto"},
    WHOLE: {},
    "factors by plain SVD": {"low_rank": "svd", "low_rank_rounds": 0},
    "factors fitted once": {"low_rank_rounds": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=32, help="evaluation windows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--codebooks", help="of all rows but those about them; those of best")
    parser.add_argument("--only", nargs="*", choices=list(CASES), help="some cases")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found: Figures = {}
    for folder in given.models:
        measure = measure_of(folder, given)
        rows: dict[str, list[tuple[float, float]]] = {}
        for case in given.only or CASES:
            rows[case] = [measure(case, seed) for seed in given.seeds]
            print(f"{folder.name}, {case}: {rows[case]}", file=sys.stderr, flush=True)
        found[folder.name] = rows
    show(found)


def measure_of(
    folder: Path, given: argparse.Namespace
) -> Callable[[str, int], tuple[float, float]]:
    """KL and bits a weight of a case and a seed, for the model in the folder."""
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    length = min(given.seq_len, original.config.max_position_embeddings)
    windows = read(folder, given.evaluation, given.windows, length)

    def measure(case: str, seed: int) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as temporary:
            made = zqfp_convert.convert(
                folder,
                Path(temporary) / "out",
                calibration=given.calibration,
                samples=given.samples,
                seq_len=length,
                seed=seed,
                device="cpu",
                **{"codebooks": given.codebooks} | CASES[case],
            )
            packed = zqfp_convert.load(made.out, device="cpu", dtype=torch.float32)
        print(f"{folder.name}, {case}: {made.ranks}", file=sys.stderr)
        return compare(original, packed, windows).kl, made.bits

    return measure


def read(folder: Path, text: Path, count: int, length: int) -> Tensor:
    """The first windows of a text, int64 `[count, length]`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = text.read_text(encoding="utf-8")
    ids = tokenizer(read, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: count * length]).view(-1, length)


def show(found: Figures) -> None:
    title = "mean KL of the seeds, ± half their distance; times best's; bits a weight"
    table = Table(title=title, box=None)
    table.add_column("")
    for model in found:
        table.add_column(model, justify="right")
    for case in next(iter(found.values())):
        cells = []
        for rows in found.values():
            kl, bits = zip(*rows[case], strict=True)
            base = rows.get(BARE if "rank" in CASES[case] else WHOLE)
            apart = (max(kl) - min(kl)) / 2
            ratio = f"  {mean(kl) / mean(one for one, _ in base):.3f}" if base else ""
            cells.append(f"{mean(kl):.4f} ± {apart:.4f}{ratio}  {mean(bits):.3f}")
        table.add_row(case, *cells)
    Console(width=60 + 30 * len(found)).print(table)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(json.dumps({"machine": machine, "kl_and_bits": found}))


if __name__ == "__main__":
    main()
