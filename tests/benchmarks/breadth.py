"""Every causal language model of the installed transformers, converted and compared.

    python tests/benchmarks/breadth.py [TYPE ...] [--jobs 2] [--markdown]

Method: of each model type in transformers' mapping of causal language models a small random model
is made (`tests/small_models.py`), saved with a tokenizer, converted with `fast` and with `best`
(12 windows of 32 tokens that the model writes itself, groups of 32, rotation as the recipe
chooses), loaded, and its logits are compared with those of transformers' own model that has the
dequantized weights (`tests/whole_reference.py`). Prints a table, then one JSON line; `--markdown`
prints what the README says instead of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
import transformers
from architectures import token_ids
from mixtures import QUICK
from small_models import model_types, write_small
from whole_reference import original, reference

import zqfp_convert
from zqfp_convert.errors import ZqfpError

RECIPES = ("fast", "best")
SECONDS = 300  # for one model
WORKS, REFUSED, UNBUILT, WRONG, CRASHED = "works", "refused", "not built", "wrong", "crashed"


@dataclass(frozen=True)
class Outcome:
    """What became of a model type with a recipe, and why."""

    kind: str
    reason: str = ""
    error: float | None = None  # to the reference, relative
    lost: float | None = None  # to the original, relative


def try_type(model_type: str, folder: Path) -> dict[str, Outcome]:
    """Make, convert, load and compare a model type with each recipe."""
    try:
        source = write_small(folder / "source", model_type)
        with torch.no_grad():
            want = original(source)(input_ids=token_ids(), use_cache=False).logits
        if want.shape[:2] != token_ids().shape or not want.isfinite().all():
            raise ValueError(f"logits of shape {list(want.shape)}, or not finite")
    except Exception as error:  # of transformers, which has many kinds
        return dict.fromkeys(RECIPES, Outcome(UNBUILT, _line(error)))
    return {recipe: _tried(source, folder / recipe, recipe, want) for recipe in RECIPES}


def _tried(source: Path, folder: Path, recipe: str, original_logits: torch.Tensor) -> Outcome:
    ids = token_ids()
    note, text = "", folder / "text.txt"
    folder.mkdir()
    text.write_text("the quick brown fox jumps over the lazy dog; " * 40)
    try:
        try:
            zqfp_convert.convert(source, folder / "packed", recipe=recipe, **QUICK)
        except ZqfpError as error:
            if "--calibration" not in str(error):
                raise
            note = "with --calibration: " + error.found
            zqfp_convert.convert(
                source, folder / "packed", recipe=recipe, calibration=text, **QUICK
            )
        with torch.no_grad():
            have = zqfp_convert.load(folder / "packed", device="cpu")(
                input_ids=ids, use_cache=False
            ).logits
    except ZqfpError as error:
        return Outcome(REFUSED, f"{error.found}; needed: {error.needed}")
    except Exception as error:
        at = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        return Outcome(CRASHED, f"{_line(error)} ({' '.join(at[-4:])})")
    try:
        want = reference(source, folder / "packed", folder / "scratch")(ids)
    except Exception as error:
        at = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        return Outcome(CRASHED, f"reference: {_line(error)} ({' '.join(at[-3:])})")
    errors = (have - want).norm(dim=-1) / want.norm(dim=-1)  # [batch, tokens]
    error = float((have - want).norm() / want.norm())
    lost = float((have - original_logits).norm() / original_logits.norm())
    # Another FP8 rounding, of sums in another order, moves a token a little; first tokens are
    # before most of it.
    same = float(errors.flatten().quantile(0.1)) < 1e-4 and error < 0.25 * lost
    return Outcome(WORKS if same else WRONG, note if same else _figures(errors), error, lost)


def _figures(errors: torch.Tensor) -> str:
    low, middle, high = errors.flatten().quantile(torch.tensor([0.1, 0.5, 1.0])).tolist()
    return f"logits off by {low:.1e}, {middle:.1e}, {high:.1e} (10 %, median, all tokens)"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _out_of_time(number: int, frame: object) -> None:
    raise TimeoutError(f"took more than {SECONDS} seconds")


def in_worker(model_type: str) -> tuple[str, dict[str, Outcome], float]:
    """Try a type in a process that only does that."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(SECONDS)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = try_type(model_type, Path(folder))
        finally:
            signal.alarm(0)
    return model_type, found, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*", default=[])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    types = options.types or model_types()
    results: dict[str, dict[str, Outcome]] = {}
    with ProcessPoolExecutor(options.jobs) as pool:
        for name, found, seconds in pool.map(in_worker, types):
            results[name] = found
            if not options.markdown:
                for recipe, one in found.items():
                    figures = "" if one.error is None else f"{one.error:.1e} {one.lost:.2f}"
                    print(f"{name:28} {recipe:5} {one.kind:9} {figures:14} {one.reason}", flush=True)
                print(f"{'':28} {seconds:.1f} s", file=sys.stderr)
    if options.markdown:
        print(markdown(results))
    count = {r: sum(one[r].kind == WORKS for one in results.values()) for r in RECIPES}
    built = sum(one["fast"].kind != UNBUILT for one in results.values())
    print(
        json.dumps(
            {
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "types": len(results),
                "built": built,
                "works": count,
                "not": {
                    name: {recipe: asdict(one[recipe]) for recipe in RECIPES}
                    for name, one in results.items()
                    if any(one[recipe].kind != WORKS for recipe in RECIPES)
                },
            }
        )
    )


def markdown(results: dict[str, dict[str, Outcome]]) -> str:
    """What the README says of a run."""
    raise NotImplementedError


if __name__ == "__main__":
    main()
