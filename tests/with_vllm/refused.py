"""What vLLM cannot run is refused while it starts, with an error that says what to do.

`make test-vllm` runs it; by hand: python tests/with_vllm/refused.py
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers as hf
from architectures import QUICK, write_model
from server import NotStarted, Server

import zqfp_convert


def newer(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 2
    path.write_text(json.dumps(config))


def unchanged(folder: Path) -> None:
    pass


# What is done to the checkpoint, with which options it is served, and what is said.
CASES: dict[str, tuple[Callable[[Path], None], list[str], int, list[str]]] = {
    "a newer format": (newer, [], 1, ["newer-version", "pip install -U zqfp-convert"]),
    "a group cut in two": (
        unchanged,
        [],
        2,
        ["down_proj: 172 input features in groups of 32", "--tensor-parallel-size"],
    ),
    "no weights": (unchanged, ["--load-format", "dummy"], 1, ["0 tensors that vLLM's model has"]),
}


def main() -> None:
    """Try each case."""
    hf.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        source = write_model(work / "source", "llama", hidden_size=128)
        zqfp_convert.convert(source, work / "packed", recipe="fast", **QUICK)
        for name, (change, options, ranks, said) in CASES.items():
            folder = work / name
            shutil.copytree(work / "packed", folder)
            change(folder)
            settings = ["--skip-tokenizer-init", "--enforce-eager", "--max-model-len", "64"]
            try:
                with Server(folder, work / "log", ranks, *settings, *options):
                    raise SystemExit(f"{name}: is served")
            except NotStarted as error:
                if missing := [text for text in said if text not in error.log]:
                    raise SystemExit(f"{error.log}\n{name}: nothing said of {missing}") from error
            print(f"{name}: refused", flush=True)


if __name__ == "__main__":
    main()
