"""The windows of text that a conversion calibrates and tunes on, kept in the partial output."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zqfp_convert.calibration import text
from zqfp_convert.checkpoint.output.partial import Partial
from zqfp_convert.conversion.block import fill
from zqfp_convert.conversion.host import give_back
from zqfp_convert.conversion.result import Progress
from zqfp_convert.model.tokenizer import tokenizer_of
from zqfp_convert.parallel import lacking
from zqfp_convert.plan import Plan

FILE = "text.safetensors"
AT_ONCE = "written"  # in the journal: how many windows the model writes at once


@dataclass(frozen=True)
class Windows:
    """Token ids, each int64 `[samples, seq_len]`.

    Attributes:
        calibration: to calibrate on.
        written: that the model has written to tune on, where text ends.
        more: of the same text, to tune on.
    """

    calibration: Tensor
    written: Tensor
    more: Tensor

    @property
    def every(self) -> list[Tensor]:
        """All of them; what is held back to judge tuning by comes last: not calibrated on."""
        return [self.calibration, self.written, self.more]

    @property
    def sha256(self) -> str:
        """Of the windows to calibrate on."""
        return hashlib.sha256(self.calibration.numpy().tobytes()).hexdigest()


def find_windows(plan: Plan, partial: Partial, report: Progress) -> Windows:
    """Those that an earlier run has kept, or new ones, which are kept.

    Of several processes the first reads a text; all of them write one.
    """
    if partial.is_whole(FILE):
        return Windows(**{name: ids.clone() for name, ids in partial.load(FILE).items()})
    calibration, more, written = _text(plan, partial, report)
    partial.save(FILE, {"calibration": calibration, "more": more, "written": written})
    return Windows(calibration, written, more)


def _text(plan: Plan, partial: Partial, report: Progress) -> tuple[Tensor, Tensor, Tensor]:
    """Windows to calibrate on, more of the same text to tune on, and self-written ones."""
    recipe = plan.recipe
    length, count = recipe.seq_len, recipe.samples
    extra = max(0, recipe.tune_samples - count) if recipe.tune > 0 else 0
    if plan.text is None:
        written = _written(plan, partial, count + extra, "writing calibration text", report)
        return written[:count], written[:0], written[count:]
    report("reading calibration text", 0, plan.weights)
    source, where = plan.text, plan.source.folder
    found, more = partial.world.lead(
        lambda: text.windows_and_more(
            source, tokenizer_of(where), count, length, recipe.seed, extra
        )
    )
    missing = recipe.tune_samples - len(found) - len(more) if recipe.tune > 0 else 0
    if missing <= 0:
        return found, more, found[:0]
    return found, more, _written(plan, partial, missing, "writing text to tune on", report)


def _written(plan: Plan, partial: Partial, count: int, what: str, report: Progress) -> Tensor:
    """Windows that the model writes, at once as many as fit; fewer than planned are noted."""
    report(what, 0, plan.weights)

    def tell(done: int, total: int) -> None:
        report(f"{what}, token {done}/{total}", 0, plan.weights)

    recipe, world, whole = plan.recipe, partial.world, _whole(plan)
    while True:
        size = [text.GENERATED_AT_ONCE, *partial.noted(AT_ONCE)][-1]
        try:
            with lacking():
                return text.generate(
                    whole, count, recipe.seq_len, recipe.seed, world, at_once=size, report=tell
                )
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # Out of the handler, which keeps alive what the failed try has computed.
        give_back(plan.device)
        partial.note(AT_ONCE, size // 2)


@torch.no_grad()
def _whole(plan: Plan) -> PreTrainedModel:
    """The original model."""
    whole = plan.skeleton()
    fill(plan, whole, "", list(plan.names.to_model))
    whole.tie_weights(missing_keys=set(plan.names.unfilled), recompute_mapping=False)
    return whole
