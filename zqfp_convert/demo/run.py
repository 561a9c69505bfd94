"""Converts the model that the package carries, and measures what that did to it.

Everything is real: a trained model, calibration text it writes itself, other text of its own to
measure on, and the packed model at work.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from zqfp_convert.calibration import text
from zqfp_convert.conversion import Conversion, Progress, convert
from zqfp_convert.errors import OutputError, Stopped
from zqfp_convert.evaluate.divergence import Divergence, compare
from zqfp_convert.generate import generate
from zqfp_convert.runtime.loader import load

SAMPLES, SEQ_LEN = 64, 256
MEASURED, MEASURED_SEED = 32, 12345  # windows of text to measure on, from another seed
PROMPTS = ("The ", "When the morning came, ", "It is a truth ")
PROMPT_TOKENS = 48


@dataclass(frozen=True)
class Measured:
    """One recipe's outcome on the demonstration model."""

    recipe: str
    conversion: Conversion
    divergence: Divergence


class Demo:
    """Runs the demonstration in a folder: `measure()` a recipe, then `lines()` of a checkpoint."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = source, folder
        self._original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        self._windows = text.generate(self._original, MEASURED, SEQ_LEN, MEASURED_SEED)

    def measure(self, recipe: str, progress: Progress | None = None) -> Measured:
        """Convert with a recipe, and compare the packed model with the original."""
        try:
            conversion = convert(
                self.source,
                self.folder / recipe,
                recipe=recipe,
                device="cpu",
                samples=SAMPLES,
                seq_len=SEQ_LEN,
                progress=progress,
            )
        except Stopped:  # a demonstration is not gone on with
            raise KeyboardInterrupt from None
        packed = load(conversion.out, device="cpu", dtype=torch.float32)
        divergence = compare(self._original, packed, self._windows)
        return Measured(recipe, conversion, divergence)

    def lines(self, checkpoint: Path) -> Iterator[str]:
        """A few lines written by the packed model."""
        for prompt in PROMPTS:
            pieces = generate(checkpoint, prompt, tokens=PROMPT_TOKENS, device="cpu")
            yield " ".join("".join(pieces).split())


@contextmanager
def demo(keep: Path | None = None) -> Iterator[Demo]:
    """A demonstration in `keep`, which must not exist, or in a folder that goes away.

    Raises:
        OutputError: `keep` exists.
    """
    if keep is not None and keep.exists():
        raise OutputError(
            str(keep), "exists", needed="a new folder", do="Give another one, or none."
        )
    folder = keep or Path(tempfile.mkdtemp(prefix="zqfp-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with as_file(files("zqfp_convert.demo") / "model") as source:
            yield Demo(source, folder)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
