"""Measures how close a packed model is to its original, on texts.

Both models run block by block over all windows, one after the other, so that only one block's
weights are in memory; then their heads run on slices of tokens, side by side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zqfp_convert.calibration.stream import batches_of
from zqfp_convert.errors import SourceError
from zqfp_convert.evaluate.divergence import PerToken
from zqfp_convert.evaluate.figures import KL_EDGES, Bucket, Figures, by_position
from zqfp_convert.evaluate.parts import Parts
from zqfp_convert.evaluate.plan import EvaluationPlan, make_plan
from zqfp_convert.evaluate.streamed import Streamed, compared, stream
from zqfp_convert.model.blocks import find_blocks

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps done so far, and their total."""


@dataclass(frozen=True)
class Measured:
    """What was measured on one text: its name, windows, figures, and these by position."""

    name: str
    windows: int
    figures: Figures
    positions: list[Bucket]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "text": self.name,
            "windows": self.windows,
            **self.figures.to_json(),
            "positions": [
                {"first": bucket.first, "last": bucket.last, **bucket.figures.to_json()}
                for bucket in self.positions
            ],
        }


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        plan: what was planned.
        texts: the outcome for each text.
        seconds: wall time.
    """

    plan: EvaluationPlan
    texts: list[Measured]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values; losses and KL in nats a token."""
        plan = self.plan
        return {
            "checkpoint": str(plan.packed.checkpoint.folder),
            "manifest_sha256": plan.packed.checkpoint.manifest_sha256,
            "against": str(plan.original.source.folder),
            "device": str(plan.device),
            "dtype": str(plan.packed.dtype).removeprefix("torch."),
            "original_dtype": str(plan.original.dtype).removeprefix("torch."),
            "window": plan.window,
            "batch": plan.batch,
            "calibrated_on": plan.calibrated_on,
            "host_memory": plan.host_memory,
            "device_memory": plan.device_memory,
            "kl_edges": KL_EDGES,
            "texts": [measured.to_json() for measured in self.texts],
            "seconds": round(self.seconds, 3),
        }


def evaluate(
    checkpoint: str | Path,
    against: str | Path,
    text: Sequence[str | Path],
    *,
    tokens: int | None = None,
    window: int | None = None,
    batch: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare a packed checkpoint with the model it was made from.

    Args:
        checkpoint: a packed checkpoint's folder, or a repository on the Hub.
        against: the original model, likewise.
        text: .txt or .jsonl files; none of them should have been calibrated on.
        tokens: how many to take of each text at most; all by default.
        window: tokens that see each other; 2048 by default, or what the models take at most.
        batch: windows that go through a block together.
        device: where to run; the first GPU when there is one.
        dtype: of the original: `float32`, `bfloat16`, `float16`, or `stored` for its
            configuration's. By default float32 on the CPU, else that of the checkpoint's
            configuration. The packed model runs in float32 on the CPU, else as `load` gives it.
        progress: called as work goes on.

    Raises:
        ZqfpError: with what stands in the way.
    """
    plan = make_plan(
        checkpoint,
        against,
        text,
        tokens=tokens,
        window=window,
        batch=batch,
        device=device,
        dtype=dtype,
    )
    return run(plan, progress)


@torch.no_grad()
def run(plan: EvaluationPlan, progress: Progress | None = None) -> Evaluation:
    """Carry out a plan, once. Raises what `evaluate` raises."""
    began = time.monotonic()
    try:
        found = _measure(plan, progress or (lambda text, done, total: None))
    except torch.OutOfMemoryError as error:
        raise SourceError(
            f"memory of {plan.device}",
            str(error).split(".")[0],
            needed=f"about {plan.device_memory / 1e6:,.0f} MB, by the plan's estimate",
            do="Use a smaller --batch, or another --device.",
        ) from error
    measured = []
    start = 0
    for text in plan.texts:
        chosen = slice(start, start + len(text.ids))
        part = found.rows(chosen)
        if not part.finite:
            raise SourceError(
                text.name,
                "NaN or infinity among the log-probabilities",
                needed="finite logits of both models",
                do="Try --dtype float32 or --device cpu; if it persists, a model is damaged.",
            )
        measured.append(Measured(text.name, len(text.ids), Figures.of(part), by_position(part)))
        start = chosen.stop
    return Evaluation(plan, measured, time.monotonic() - began)


def _measure(plan: EvaluationPlan, report: Progress) -> PerToken:
    """Every predicted token of all texts, `[windows, window - 1]` on the CPU."""
    ids = torch.cat([text.ids for text in plan.texts])
    batches = batches_of(ids, plan.batch * plan.window, plan.device)
    blocks = [len(find_blocks(parts.model).modules) for parts in (plan.original, plan.packed)]
    total = (sum(blocks) + 1) * len(batches)
    done = 0

    def through(name: str, parts: Parts, count: int) -> Streamed:
        def step(index: int) -> None:
            nonlocal done
            done += 1
            report(f"{name}, block {index + 1}/{count}", done, total)

        return stream(parts, batches, step)

    original = through("original", plan.original, blocks[0])
    packed = through("quantized", plan.packed, blocks[1])
    found = []
    for index, batch in enumerate(batches):
        report("comparing", done + index, total)
        heads, hidden = (original.head, packed.head), (original.hidden[index], packed.hidden[index])
        found.append(compared(heads, hidden, batch, plan.head_tokens))
    return PerToken.joined(found)
