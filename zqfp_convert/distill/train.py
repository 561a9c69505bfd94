"""Moves a quantized model towards the token distributions of its original.

`KL(original || quantized)`, averaged over the tokens of calibration text, falls by Adam (Kingma and
Ba, arXiv:1412.6980) with a learning rate that decays to nothing. Some windows are held back: what
did not help on them is not kept. The original is there as what its last block gave, no more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from zqfp_convert.distill.adam import Adam, Learnt
from zqfp_convert.distill.student import Student
from zqfp_convert.distill.tunable import REACH, size_of, tunables
from zqfp_convert.model.blocks import Blocks

HELD_BACK = 16  # of so many windows one
WINDOWS_AT_ONCE = 2  # in a step
TOKENS_AT_ONCE = 512  # whose distributions are compared at a time
WARM_UP = 0.05  # of the steps, in which the learning rate rises
# Learning rates: in steps of the grid, and as shares of a value's own size.
RATES = {"roundings": 0.004, "row_scales": 2e-4, "factors": 2e-3, "norms": 1e-3}
Report = Callable[[int, int], None]
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What tuning did.

    Attributes:
        kl_before, kl_after: mean token KL on the windows held back, nats.
        kept: whether the result is what the model now is; else it is as it was.
        roundings: whether roundings were tuned too, or row scales, factors and norms alone.
        norms: tuned weights and biases of norms by name; none if the result is not kept.
        seconds: that it took.
    """

    kl_before: float
    kl_after: float
    kept: bool
    roundings: bool
    norms: dict[str, Tensor]
    seconds: float


def distill(
    model: PreTrainedModel,
    blocks: Blocks,
    original: Tensor,
    windows: Tensor,
    steps: int,
    stored: torch.dtype,
    *,
    seed: int = 0,
    report: Report | None = None,
) -> Outcome:
    """Tune the `TunableLinear`s of a model, and its norms, in place.

    Args:
        model: with tunable linears in its blocks; outside of them it is the original.
        blocks: of the model.
        original: the original's hidden states behind its last block, `[samples, seq_len, width]`,
            on the CPU.
        windows: token ids, int64 `[samples, seq_len]`.
        steps: of the optimizer.
        stored: dtype of norms in the file.
        seed: of the order of windows.
        report: called with the steps done, and their total.
    """
    began = time.monotonic()
    say = report or (lambda done, total: None)
    student = Student(model, blocks, stored)
    held = max(1, len(windows) // HELD_BACK) if len(windows) > 1 else 0
    training, proof = slice(len(windows) - held), slice(len(windows) - max(1, held), None)
    before = _divergence(student, original[proof], windows[proof])
    adam = Adam(_learnt(student))
    order = torch.Generator().manual_seed(seed)
    count = len(windows[training])
    queue: list[int] = []
    for step in range(steps):
        say(step, steps)
        chosen: list[int] = []
        while len(chosen) < min(WINDOWS_AT_ONCE, count):
            queue = queue or torch.randperm(count, generator=order).tolist()
            chosen.append(queue.pop())
        adam.begin(_share(step, steps))
        with torch.enable_grad():
            loss = _kl(student, original[chosen], windows[chosen])
            # Between the mean over tokens and their sum, so that float16 gradients of hidden states
            # do not vanish and those of weights do not overflow. Adam does not see the difference.
            scaled = loss * math.sqrt(windows[chosen].numel())
            scaled.backward()  # type: ignore[no-untyped-call]
    say(steps, steps)
    adam.end()
    after = _divergence(student, original[proof], windows[proof])
    kept = after < before
    if not kept:
        student.reset()
    norms = student.stored_norms() if kept else {}
    roundings = any(linear.shift is not None for linear in tunables(model))
    model.requires_grad_(False)
    return Outcome(before, after, kept, roundings, norms, time.monotonic() - began)


def kl(original: Logits, tuned: Logits, wanted: Tensor, hidden: Tensor) -> Tensor:
    """Mean token `KL(original || tuned)`, nats, in float32.

    In parts, computed again for their gradients, so that the logits of one are in memory at a time.

    Args:
        original, tuned: from hidden states `[tokens, width]` to logits `[tokens, vocabulary]`.
        wanted, hidden: the hidden states of both, `[tokens, width]`.
    """

    def total_of(wanted: Tensor, hidden: Tensor) -> Tensor:
        p = original(wanted).float().log_softmax(-1)
        q = tuned(hidden).float().log_softmax(-1)
        return (p.exp() * (p - q)).sum()

    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(wanted), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        total = total + checkpoint(
            total_of, wanted[part], hidden[part], use_reentrant=False, preserve_rng_state=False
        )
    return total / len(wanted)


def _kl(student: Student, original: Tensor, windows: Tensor) -> Tensor:
    hidden = student.hidden(windows.to(student.device)).flatten(0, 1)
    wanted = original.to(student.device).flatten(0, 1)
    return kl(student.original_logits, student.logits, wanted, hidden)


def _learnt(student: Student) -> list[Learnt]:
    """All that learns, with its rate."""
    learnt: list[Learnt] = []
    for linear in tunables(student.model):
        if linear.handle is not None:
            learnt.append(Learnt(linear.handle, RATES["roundings"] / REACH, linear.shift))
        if linear.row_gain is not None:
            learnt.append(Learnt(linear.row_gain, RATES["row_scales"]))
        for factor in (linear.A, linear.B):
            if factor is not None:
                learnt.append(Learnt(factor, RATES["factors"] * size_of(factor)))
    for vector in student.norms.values():
        learnt.append(Learnt(vector, RATES["norms"] * max(size_of(vector), 1e-6)))
    return learnt


def _share(step: int, steps: int) -> float:
    """Of the learning rates, in a step."""
    rising = max(1, round(WARM_UP * steps))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))


@torch.no_grad()
def _divergence(student: Student, original: Tensor, windows: Tensor) -> float:
    pairs = zip(original, windows, strict=True)
    total = sum(float(_kl(student, wanted[None], ids[None])) for wanted, ids in pairs)
    return total / len(windows)
