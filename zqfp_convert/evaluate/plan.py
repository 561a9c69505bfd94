"""What an evaluation is going to do, worked out and checked before any work begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.checkpoint.source import hub
from zqfp_convert.checkpoint.source.source import Source
from zqfp_convert.errors import CheckpointError, OptionError
from zqfp_convert.evaluate import texts
from zqfp_convert.evaluate.parts import SourceParts
from zqfp_convert.evaluate.texts import Windows
from zqfp_convert.model.blocks import Blocks, find_blocks, linears, shape
from zqfp_convert.model.configured import configured
from zqfp_convert.model.device import compute_dtype, resolve_device, too_little_memory
from zqfp_convert.model.tokenizer import check_tokens, tokenizer_of
from zqfp_convert.plan import TOKENS_AT_ONCE, positions
from zqfp_convert.runtime.loader import PackedParts

WINDOW = 2048
STORED = "stored"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOGITS_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 26}  # numbers in the logits of a slice of tokens
COMPARED = 20_000  # characters of text on which two tokenizers have to agree


@dataclass(frozen=True)
class EvaluationPlan:
    """A checked evaluation.

    Attributes:
        original, packed: the two models, without weights.
        device: where they run.
        texts: the windows to measure on, all of one length.
        batch: windows that go through a block together.
        head_tokens: tokens that have logits at a time.
        calibrated_on: the name of the text that the checkpoint was calibrated on, if on any.
        hidden_memory: bytes of the hidden states of both models, in host memory.
        host_memory, device_memory: estimated peaks in bytes, beside the program itself; on the CPU
            both are one and in the first.
    """

    original: SourceParts
    packed: PackedParts
    device: torch.device
    texts: list[Windows]
    batch: int
    head_tokens: int
    calibrated_on: str | None
    hidden_memory: int
    host_memory: int
    device_memory: int

    @property
    def window(self) -> int:
        """Tokens in each window."""
        return self.texts[0].ids.shape[1]

    @property
    def windows(self) -> int:
        """How many windows all texts have together."""
        return sum(len(text.ids) for text in self.texts)

    @property
    def seen_in_calibration(self) -> list[str]:
        """Texts that have the name of the one the checkpoint was calibrated on."""
        return [text.name for text in self.texts if text.name == self.calibrated_on]


def make_plan(
    checkpoint: str | Path,
    against: str | Path,
    text: Sequence[str | Path],
    *,
    tokens: int | None = None,
    window: int | None = None,
    batch: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
) -> EvaluationPlan:
    """Check everything that can be checked before work begins, and say what will be done.

    Raises:
        ZqfpError: whatever stands in the way.
    """
    target = resolve_device(device)
    if not text:
        raise OptionError(
            "--text",
            "none given",
            needed="a text to measure on that the model was not calibrated on",
            do="Give --text FILE, a .txt or .jsonl file, such as the test split of WikiText-2; "
            "repeat it for more.",
        )
    documents = [texts.read(name) for name in text]
    packed = PackedParts(
        PackedCheckpoint(hub.fetch(checkpoint)),
        target,
        torch.float32 if target.type == "cpu" else None,
    )
    source = Source(hub.fetch(against))
    original = SourceParts(source, target, _cast(dtype, target, packed.model.dtype))
    tokenizer = _same_tokenizer(packed, original, documents[0][1][:COMPARED])
    length = _window(window, original.model, packed.model)
    found = [texts.cut(name, whole, tokenizer, length, tokens) for name, whole in documents]
    for each in found:
        check_tokens(original.model, source.folder, each.ids)
    together = batch or max(1, TOKENS_AT_ONCE[target.type] // length)
    vocabulary = _vocabulary(original.model)
    head_tokens = max(1, LOGITS_AT_ONCE[target.type] // vocabulary)
    calibration = packed.checkpoint.quantization.get("calibration") or {}
    count = sum(each.ids.numel() for each in found)
    hidden = count * (_hidden(original) + _hidden(packed))
    block, work = _working_memory(original, packed, min(together * length, count))
    work += (
        8 * 4 * min(head_tokens, count) * vocabulary
    )  # logits of both, and what KL makes of them
    on_cpu = target.type == "cpu"
    plan = EvaluationPlan(
        original=original,
        packed=packed,
        device=target,
        texts=found,
        batch=together,
        head_tokens=head_tokens,
        calibrated_on=calibration.get("source"),
        hidden_memory=hidden,
        host_memory=hidden + (work if on_cpu else block),
        device_memory=0 if on_cpu else work,
    )
    _check_room(plan)
    return plan


def _cast(name: str | None, device: torch.device, stored: torch.dtype) -> torch.dtype | None:
    if name is None:
        return compute_dtype(device, stored)
    if name == STORED:
        return None
    if name not in DTYPES:
        raise OptionError(
            "--dtype", name, needed=f"{', '.join(DTYPES)} or {STORED}", do="Give one of these."
        )
    return DTYPES[name]


def _same_tokenizer(
    packed: PackedParts, original: SourceParts, sample: str
) -> PreTrainedTokenizerBase:
    """The tokenizer of both models, which have to share it and the vocabulary."""
    ours, theirs = packed.checkpoint.folder, original.source.folder
    sizes = _vocabulary(packed.model), _vocabulary(original.model)
    if sizes[0] != sizes[1]:
        raise _another_model(ours, theirs, f"{sizes[0]} tokens in its vocabulary, not {sizes[1]}")
    tokenizer, other = tokenizer_of(ours), tokenizer_of(theirs)
    same = tokenizer.get_vocab() == other.get_vocab()
    if not same or tokenizer(sample)["input_ids"] != other(sample)["input_ids"]:
        raise _another_model(ours, theirs, "another tokenizer")
    return tokenizer


def _another_model(ours: Path, theirs: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "another-model",
        str(ours),
        f"{found}, compared with {theirs}",
        needed="two models with one vocabulary",
        do="Give the model that this checkpoint was made from to --against.",
    )


def _window(wanted: int | None, *models: PreTrainedModel) -> int:
    limit = min(positions(model) for model in models)
    if wanted is None:
        return min(WINDOW, limit)
    if not 2 <= wanted <= limit:
        raise OptionError(
            "--window",
            f"{wanted} tokens",
            needed=f"2 to {limit}, the most that the model takes",
            do="Give another length.",
        )
    return wanted


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _hidden(parts: SourceParts | PackedParts) -> int:
    """Bytes of a token's hidden state."""
    width = configured(parts.model, "hidden_size") or 0
    return width * parts.dtype.itemsize


def _working_memory(original: SourceParts, packed: PackedParts, at_once: int) -> tuple[int, int]:
    """Estimated bytes: of the largest block, and of all that is there while blocks run."""
    models: list[tuple[Blocks, PreTrainedModel, int]] = [
        (find_blocks(parts.model), parts.model, parts.dtype.itemsize)
        for parts in (original, packed)
    ]
    block = max(_count(module) * width for blocks, _, width in models for module in blocks.modules)
    outside = sum(
        (_count(model) - sum(map(_count, blocks.modules))) * width
        for blocks, model, width in models
    )
    shapes = [shape(linear) for module in models[0][0].modules for _, linear in linears(module)]
    unpacked = 4 * 3 * max(rows * columns for rows, columns in shapes)  # of the reference path
    activations = 8 * 4 * at_once * max(max(pair) for pair in shapes)
    return block, block + outside + unpacked + activations


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _check_room(plan: EvaluationPlan) -> None:
    short = too_little_memory(plan.host_memory, plan.device, plan.device_memory)
    if short is not None:
        where, found, needed = short
        do = "Give fewer --tokens, a smaller --batch or --window, or another --device."
        raise OptionError(where, found, needed=needed, do=do)
