"""Every causal language model of the installed transformers, converted and compared.

    python tests/benchmarks/breadth.py [TYPE ...] [--jobs 2] [--keep FILE] [--markdown]

Method: of each model type in transformers' mapping of causal language models a small random model
is made (`tests/small_models.py`), saved with a tokenizer, converted with `fast` and with `best`
(12 windows of 32 tokens that the model writes itself, groups of 32, rotation as the recipe
chooses), loaded by `zqfp_convert.load` and by `from_pretrained`, whose logits have to be the same
bits where weights lie alike in memory, and compared with transformers' own model that has the
dequantized weights (`tests/whole_reference.py`). Prints a table, then one JSON line; `--markdown`
prints what the README says instead of the table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import textwrap
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
import transformers  # noqa: E402
from small_models import model_types  # noqa: E402
from whole_way import RECIPES, UNBUILT, WORKS, Outcome, try_type  # noqa: E402

SECONDS = 300  # for one model


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
    # Some models print what they do not know.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
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
    parser.add_argument("--keep", type=Path, help="go on with the outcomes in this JSON file")
    options = parser.parse_args()
    types = options.types or model_types()
    kept: dict[str, dict[str, Outcome]] = {}
    if options.keep is not None and options.keep.exists():
        for name, found in json.loads(options.keep.read_text()).items():
            kept[name] = {recipe: Outcome(**one) for recipe, one in found.items()}
    with ProcessPoolExecutor(options.jobs) as pool:
        for name, found, seconds in pool.map(in_worker, [n for n in types if n not in kept]):
            kept[name] = found
            if options.keep is not None:
                every = {n: {r: asdict(o) for r, o in one.items()} for n, one in kept.items()}
                options.keep.write_text(json.dumps(every))
            if not options.markdown:
                for recipe, one in found.items():
                    figures = "" if one.error is None else f"{one.error:.1e} {one.lost:.2f}"
                    print(
                        f"{name:28} {recipe:5} {one.kind:9} {figures:14} {one.reason}", flush=True
                    )
                print(f"{'':28} {seconds:.1f} s", file=sys.stderr)
    results = {name: kept[name] for name in types}
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
    built = {n: found for n, found in results.items() if found["fast"].kind != UNBUILT}
    works = {r: [n for n, one in built.items() if one[r].kind == WORKS] for r in RECIPES}
    by_text = [n for n in works["best"] if built[n]["best"].reason]
    said = (
        f"transformers {transformers.__version__} maps {len(results)} model types to a causal "
        f"language model; {len(built)} of them can be built small and by themselves. Of these "
        f"{len(works['fast'])} work with `fast` and {len(works['best'])} with `best`"
    )
    if by_text:
        said += f" ({', '.join(by_text)} with `--calibration`: they cannot write text in that size)"
    lines = [
        *textwrap.wrap(f"{said}. The others:", 110, break_on_hyphens=False),
        "",
        "| type | `fast` | `best` | reason |",
        "|---|---|---|---|",
    ]
    for name, found in built.items():
        if any(found[recipe].kind != WORKS for recipe in RECIPES):
            fast, best = (found[recipe] for recipe in RECIPES)
            reason = (fast.reason or best.reason).split("; needed")[0]
            lines.append(f"| {name} | {fast.kind} | {best.kind} | {reason} |")
    lines += ["", "Not built, so not tried:", ""]
    for name, found in results.items():
        if name not in built:
            lines.append(f"- {name}: {textwrap.shorten(found['fast'].reason, 110)}")
    whole = f"With both recipes work: {', '.join(n for n in works['fast'] if n in works['best'])}."
    lines += ["", *textwrap.wrap(whole, 110, break_on_hyphens=False)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
