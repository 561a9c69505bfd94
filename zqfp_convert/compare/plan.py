"""What a comparison is going to do, worked out and checked before any work begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from zqfp_convert.calibration.text import Text
from zqfp_convert.checkpoint.source import hub
from zqfp_convert.checkpoint.source.source import Source
from zqfp_convert.compare.configuration import Configuration
from zqfp_convert.errors import OptionError, SourceError
from zqfp_convert.evaluate import texts
from zqfp_convert.evaluate.parts import SourceParts
from zqfp_convert.evaluate.texts import Windows
from zqfp_convert.model.blocks import find_blocks, linears, shape
from zqfp_convert.model.configured import configured
from zqfp_convert.model.device import resolve_device, too_little_memory
from zqfp_convert.model.experts import mixtures
from zqfp_convert.model.tokenizer import check_tokens, tokenizer_of
from zqfp_convert.plan import TOKENS_AT_ONCE, positions

WINDOW = 2048
SEQ_LEN = 1024
SAMPLES = 16
WRITTEN = 16  # windows that the model writes to be measured on, where no text is given
LOGITS_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 26}  # numbers in the logits of a slice of tokens


@dataclass(frozen=True)
class StudyPlan:
    """A checked comparison.

    Attributes:
        parts: the model, without weights.
        device: where it runs.
        stored_bits: that a weight takes in the model's configured dtype.
        configurations: what is compared.
        texts: the windows to measure on; empty where the model is to write them.
        window: tokens in each of them.
        calibration: the text to calibrate on, or None where the model is to write it.
        samples, seq_len, seed: of the calibration windows.
        head_tokens: tokens that have logits at a time.
        host_memory, device_memory: estimated peaks in bytes, beside the program itself; on the CPU
            both are one and in the first.
    """

    parts: SourceParts
    device: torch.device
    stored_bits: int
    configurations: list[Configuration]
    texts: list[Windows]
    window: int
    calibration: Text | None
    samples: int
    seq_len: int
    seed: int
    head_tokens: int
    host_memory: int
    device_memory: int

    @property
    def calibrates(self) -> bool:
        """Whether any configuration looks at calibration text."""
        return any(each.calibrates for each in self.configurations)

    @property
    def writes(self) -> bool:
        """Whether the model has to write text, for which it has to be in memory as a whole."""
        return not self.texts or (self.calibrates and self.calibration is None)


def make_plan(
    model: str | Path,
    configurations: Sequence[Configuration],
    text: Sequence[str | Path] = (),
    *,
    calibration: str | Path | None = None,
    samples: int = SAMPLES,
    seq_len: int | None = None,
    seed: int = 0,
    tokens: int | None = None,
    window: int | None = None,
    device: str | torch.device | None = None,
) -> StudyPlan:
    """Check everything that can be checked before work begins, and say what will be done.

    Raises:
        ZqfpError: whatever stands in the way.
    """
    target = resolve_device(device)
    if not configurations:
        raise OptionError(
            "--configuration",
            "nothing to compare",
            needed="a preset or a configuration",
            do="Give --preset zeroquant-fp.",
        )
    if samples < 1:
        raise OptionError("--samples", f"{samples}", needed="1 or more", do="Give another number.")
    documents = [texts.read(name) for name in text]
    wanted = None if calibration is None else Text.named(calibration)
    source = Source(hub.fetch(model))
    parts = SourceParts(source, target, torch.float32 if target.type == "cpu" else None)
    if any(mixtures(block) for block in find_blocks(parts.model).modules):
        raise SourceError(
            type(parts.model).__name__,
            "a mixture of experts",
            needed="blocks of linears that every token goes through",
            do="Convert the model and use 'evaluate'; comparisons of configurations take dense "
            "models.",
        )
    limit = positions(parts.model)
    length = _length("--window", window, WINDOW, limit)
    calibrated = _length("--seq-len", seq_len, SEQ_LEN, limit)
    found: list[Windows] = []
    if documents:
        tokenizer = tokenizer_of(source.folder)
        found = [texts.cut(name, whole, tokenizer, length, tokens) for name, whole in documents]
        for each in found:
            check_tokens(parts.model, source.folder, each.ids)
    else:
        length = min(length, calibrated)
    vocabulary = int(parts.model.get_output_embeddings().weight.shape[0])
    plan = StudyPlan(
        parts=parts,
        device=target,
        stored_bits=8 * parts.model.dtype.itemsize,
        configurations=list(configurations),
        texts=found,
        window=length,
        calibration=wanted,
        samples=samples,
        seq_len=calibrated,
        seed=seed,
        head_tokens=max(1, LOGITS_AT_ONCE[target.type] // vocabulary),
        host_memory=0,
        device_memory=0,
    )
    plan = _with_memory(plan, vocabulary)
    short = too_little_memory(plan.host_memory, plan.device, plan.device_memory)
    if short is not None:
        where, was, needed = short
        do = "Give fewer --tokens or --samples, or another --device."
        if plan.writes:
            do += " With --text and --calibration the model need not be in memory as a whole."
        raise OptionError(where, was, needed=needed, do=do)
    return plan


def _length(option: str, wanted: int | None, usual: int, limit: int) -> int:
    if wanted is None:
        return min(usual, limit)
    if not 2 <= wanted <= limit:
        raise OptionError(
            option,
            f"{wanted} tokens",
            needed=f"2 to {limit}, the most that the model takes",
            do="Give another length.",
        )
    return wanted


def _with_memory(plan: StudyPlan, vocabulary: int) -> StudyPlan:
    """The plan with an estimate of what is in memory at once."""
    parts, item = plan.parts, plan.parts.dtype.itemsize
    blocks = find_blocks(parts.model)
    width = configured(parts.model, "hidden_size") or 0
    measured = sum(each.ids.numel() for each in plan.texts) or WRITTEN * plan.window
    calibrated = plan.samples * plan.seq_len if plan.calibrates else 0
    hidden = (2 * measured + calibrated) * width * item  # the original's stay
    block = max(map(_count, blocks.modules)) * item
    whole = _count(parts.model) * item
    outside = whole - sum(map(_count, blocks.modules)) * item
    shapes = [shape(linear) for module in blocks.modules[:1] for _, linear in linears(module)]
    hessians = 4 * 4 * sum(columns**2 for _, columns in shapes)  # sums, factors and their making
    solving = 8 * 4 * max(rows * columns for rows, columns in shapes)
    at_once = max(TOKENS_AT_ONCE[plan.device.type], plan.window, plan.seq_len)
    activations = 8 * 4 * at_once * max(max(pair) for pair in shapes)
    logits = 8 * 4 * plan.head_tokens * vocabulary
    if any(each.trains for each in plan.configurations):
        block *= 4  # with gradients and Adam's moments
        activations *= 8  # kept for the way back
    work = outside + 2 * block + hessians + solving + activations + logits
    if plan.writes:
        work = max(work, 2 * whole)
    if plan.device.type == "cpu":
        return replace(plan, host_memory=hidden + work)
    return replace(plan, host_memory=hidden + block, device_memory=work)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
