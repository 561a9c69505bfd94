"""Runs configurations on a model, block by block in memory, and measures what they cost.

For each configuration the calibration windows and the windows to measure on go through the model
together; a block's linears are quantized, and forgotten again, when the windows get there.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zqfp_convert.calibration import text as writing
from zqfp_convert.calibration.stream import Entrance, batches_of
from zqfp_convert.compare.block import quantize_block
from zqfp_convert.compare.configuration import Configuration
from zqfp_convert.compare.formats import NONE
from zqfp_convert.compare.plan import WRITTEN, StudyPlan, make_plan
from zqfp_convert.errors import SourceError
from zqfp_convert.evaluate.divergence import PerToken
from zqfp_convert.evaluate.figures import Figures
from zqfp_convert.evaluate.parts import SourceParts
from zqfp_convert.evaluate.streamed import Streamed, compared, stream
from zqfp_convert.evaluate.texts import Windows
from zqfp_convert.model import skeleton
from zqfp_convert.model.blocks import Blocks, find_blocks, linears, weight_matrix
from zqfp_convert.model.tokenizer import check_tokens, tokenizer_of
from zqfp_convert.plan import TOKENS_AT_ONCE

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps done so far, and their total."""

OTHER_SEED = 12345  # added to the seed of calibration text for text to measure on


@dataclass(frozen=True)
class Row:
    """What one configuration costs.

    Attributes:
        configuration: which it is.
        bits: that a weight of the blocks' linears takes on average, scales and factors included.
        figures: for each text.
        seconds: wall time; 0 where the same had been measured for a row before.
    """

    configuration: Configuration
    bits: float
    figures: list[Figures]
    seconds: float


@dataclass(frozen=True)
class Study:
    """What a comparison found.

    Attributes:
        plan: what was planned.
        texts: the windows that were measured on.
        calibration: text, number and length of the calibration windows; None without any.
        rows: the outcome for each configuration.
        seconds: wall time.
    """

    plan: StudyPlan
    texts: list[Windows]
    calibration: dict[str, Any] | None
    rows: list[Row]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values; losses and KL in nats a token."""
        plan = self.plan
        return {
            "model": str(plan.parts.source.folder),
            "device": str(plan.device),
            "dtype": str(plan.parts.dtype).removeprefix("torch."),
            "window": plan.window,
            "calibration": self.calibration,
            "host_memory": plan.host_memory,
            "device_memory": plan.device_memory,
            "rows": [
                {
                    **row.configuration.to_json(),
                    "bits": round(row.bits, 4),
                    "seconds": round(row.seconds, 3),
                    "texts": [
                        {"text": text.name, "windows": len(text.ids), **figures.to_json()}
                        for text, figures in zip(self.texts, row.figures, strict=True)
                    ],
                }
                for row in self.rows
            ],
            "seconds": round(self.seconds, 3),
        }


def compare(
    model: str | Path,
    configurations: Sequence[Configuration],
    text: Sequence[str | Path] = (),
    *,
    calibration: str | Path | None = None,
    samples: int = 16,
    seq_len: int | None = None,
    seed: int = 0,
    tokens: int | None = None,
    window: int | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Study:
    """Measure what each of some ways to quantize a model costs, without writing anything.

    Args:
        model: a folder, or a repository on the Hub.
        configurations: the ways, such as `presets.preset("zeroquant-fp", 256, 8)`.
        text: .txt or .jsonl files to measure on; by default the model writes text itself.
        calibration: a .txt or .jsonl file, or a data set on the Hub; the model's own by default.
        samples, seq_len, seed: of the calibration windows.
        tokens: how many to take of each text at most; all by default.
        window: tokens of text that see each other; 2048, or what the model takes at most.
        device: where to run; the first GPU when there is one.
        progress: called as work goes on.

    Raises:
        ZqfpError: with what stands in the way.
    """
    plan = make_plan(
        model,
        configurations,
        text,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        tokens=tokens,
        window=window,
        device=device,
    )
    return run(plan, progress)


@torch.no_grad()
def run(plan: StudyPlan, progress: Progress | None = None) -> Study:
    """Carry out a plan, once. Raises what `compare` raises."""
    try:
        return _Work(plan, progress or (lambda text, done, total: None)).study()
    except torch.OutOfMemoryError as error:
        raise SourceError(
            f"memory of {plan.device}",
            str(error).split(".")[0],
            needed=f"about {plan.device_memory / 1e6:,.0f} MB, by the plan's estimate",
            do="Use fewer --samples, shorter windows, or another --device.",
        ) from error


class _Work:
    """A comparison under way: its windows, and what the original makes of them."""

    def __init__(self, plan: StudyPlan, report: Progress) -> None:
        self.plan, self.report = plan, report
        self.began = time.monotonic()
        self.blocks: Blocks = find_blocks(plan.parts.model)
        distinct = {each.unnamed() for each in plan.configurations}
        self.total = (1 + len(distinct)) * len(self.blocks.modules)
        self.done = 0

    def study(self) -> Study:
        plan = self.plan
        self.report("preparing text", 0, self.total)
        texts, windows = self._windows()
        at_once = TOKENS_AT_ONCE[plan.device.type]
        ids = torch.cat([text.ids for text in texts])
        measured = batches_of(ids, at_once, plan.device)
        calibration = [] if windows is None else batches_of(windows, at_once, plan.device)
        last = len(self.blocks.modules) - 1
        original = stream(plan.parts, measured, lambda index: None)
        self.done = last + 1
        known: dict[Configuration, Row] = {}
        rows = []
        for number, configuration in enumerate(plan.configurations, 1):
            same = known.get(configuration.unnamed())
            if same is None:
                named = f"{number}/{len(plan.configurations)} {configuration.label}"
                row = self._row(configuration, named, texts, calibration, measured, original)
                known[configuration.unnamed()] = row
            else:
                row = Row(configuration, same.bits, same.figures, 0.0)
            rows.append(row)
        described = None
        if windows is not None:
            described = {
                "source": "written by the model"
                if plan.calibration is None
                else plan.calibration.name,
                "samples": windows.shape[0],
                "seq_len": windows.shape[1],
                "seed": plan.seed,
            }
        return Study(plan, texts, described, rows, time.monotonic() - self.began)

    def _windows(self) -> tuple[list[Windows], Tensor | None]:
        """The windows to measure on, and those to calibrate on where any are needed."""
        plan = self.plan
        source = plan.parts.source
        texts, windows = list(plan.texts), None
        whole = None
        if plan.writes:
            self.report("writing text", 0, self.total)
            parts = SourceParts(source, plan.device, plan.parts.dtype)
            parts.fill(parts.model, "", list(parts.names.to_model))
            whole = parts.model
            whole.tie_weights(missing_keys=set(parts.names.unfilled), recompute_mapping=False)
        if plan.calibrates and plan.calibration is not None:
            tokenizer = tokenizer_of(source.folder)
            windows = writing.windows(
                plan.calibration, tokenizer, plan.samples, plan.seq_len, plan.seed
            )
            check_tokens(plan.parts.model, source.folder, windows)
        elif plan.calibrates:
            assert whole is not None
            windows = writing.generate(whole, plan.samples, plan.seq_len, plan.seed)
        if not texts:
            assert whole is not None
            ids = writing.generate(whole, WRITTEN, plan.window, plan.seed + OTHER_SEED)
            texts = [Windows("written by the model", ids)]
        if whole is not None:
            skeleton.empty(whole)
        return texts, windows

    def _row(
        self,
        configuration: Configuration,
        named: str,
        texts: list[Windows],
        calibration: list[Tensor],
        measured: list[Tensor],
        original: Streamed,
    ) -> Row:
        began = time.monotonic()
        before = calibration if configuration.calibrates else []
        hidden, bits = self._through(configuration, named, before, measured)
        heads, size = (original.head, original.head), self.plan.head_tokens
        found = PerToken.joined(
            [
                compared(heads, (original.hidden[index], hidden[index]), ids, size)
                for index, ids in enumerate(measured)
            ]
        )
        figures, start = [], 0
        for text in texts:
            chosen = slice(start, start + len(text.ids))
            part = found.rows(chosen)
            if not part.finite:
                raise SourceError(
                    f"{text.name}, {configuration.label}",
                    "NaN or infinity among the log-probabilities",
                    needed="finite logits of both models",
                    do="Try --device cpu (float32); if it persists, leave this configuration out.",
                )
            figures.append(Figures.of(part))
            start = chosen.stop
        return Row(configuration, bits, figures, time.monotonic() - began)

    def _through(
        self,
        configuration: Configuration,
        named: str,
        calibration: list[Tensor],
        measured: list[Tensor],
    ) -> tuple[list[Tensor], float]:
        """What the quantized blocks make of the windows measured on; and the bits of a weight."""
        parts, blocks = self.plan.parts, self.blocks
        batches = [*calibration, *measured]
        entrance = Entrance(blocks, batches)
        hidden = [entrance.enter(batch).cpu() for batch in range(len(batches))]
        bits, weights = 0, 0
        for index, empty in enumerate(blocks.modules):
            self.report(f"{named}, block {index + 1}/{len(blocks.modules)}", self.done, self.total)
            block = copy.deepcopy(empty)
            name = blocks.name(index)
            parts.fill(block, name + ".", parts.names.within(name))
            entrance.try_block(index, block)
            calls = entrance.calls(index)
            weights += sum(weight_matrix(linear).numel() for _, linear in linears(block))
            bits += quantize_block(block, calls, hidden, len(calibration), configuration)
            for batch, ids in enumerate(batches):
                hidden[batch] = calls(batch).run(block, hidden[batch].to(ids.device)).cpu()
            self.done += 1
        average = self.plan.stored_bits if configuration.weights == NONE else bits / weights
        return hidden[len(calibration) :], average
