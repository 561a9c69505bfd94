"""Moves a quantized model towards the token distributions of its original.

`KL(original || quantized)`, averaged over the tokens of calibration text, falls by Adam (Kingma and
Ba, arXiv:1412.6980) with a learning rate that decays to nothing. Some windows are held back: what
did not help on them is not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from zqfp_convert.distill.tunable import TunableLinear, learnable, size_of, straight

HELD_BACK = 8  # of so many windows one
TOKENS_AT_ONCE = 512  # whose distributions are compared at a time
WARM_UP = 0.05  # of the steps, in which the learning rate rises
# Learning rates: in steps of the grid, and as shares of a value's own size.
RATES = {"roundings": 0.004, "row_scales": 2e-4, "factors": 2e-3, "norms": 1e-3}
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What tuning did.

    Attributes:
        kl_before, kl_after: mean token KL on the windows held back, nats.
        kept: whether the result is what the model now is; else it is as it was.
        norms: tuned weights and biases of norms by name; none if the result is not kept.
    """

    kl_before: float
    kl_after: float
    kept: bool
    norms: dict[str, Tensor]


class _Student(nn.Module):
    """The quantized model, with norms that can be learnt."""

    def __init__(self, model: PreTrainedModel, stored: torch.dtype) -> None:
        super().__init__()
        self.model, self.stored = model, stored
        given = {
            f"{path}.{name}": value
            for path, module in model.named_modules()
            if "Norm" in type(module).__name__
            for name, value in module.named_parameters(recurse=False)
            if value.ndim == 1
        }
        self.names, self.dtypes = [*given], [value.dtype for value in given.values()]
        self.vectors = nn.ParameterList(value.detach().float().clone() for value in given.values())

    def values(self) -> dict[str, Tensor]:
        """The vectors as the file will have them, by name; rounding counts as the identity."""
        return {
            name: straight(vector, vector.detach().to(self.stored).float()).to(dtype)
            for name, vector, dtype in zip(self.names, self.vectors, self.dtypes, strict=True)
        }

    def forward(self, ids: Tensor) -> Tensor:
        """Logits `[B, T, vocabulary]`."""
        given = {"input_ids": ids, "use_cache": False}
        logits: Tensor = functional_call(self.model, self.values(), (), given).logits
        return logits


def distill(
    model: PreTrainedModel,
    original: PreTrainedModel,
    windows: Tensor,
    steps: int,
    stored: torch.dtype,
    *,
    windows_at_once: int = 2,
    seed: int = 0,
    report: Report | None = None,
) -> Outcome:
    """Tune the `TunableLinear`s of a model, and its norms, in place.

    Args:
        model: with tunable linears; everything else is left alone.
        original: the model that it is made of.
        windows: token ids, int64 `[samples, seq_len]`.
        steps: of the optimizer.
        stored: dtype of norms in the file.
        windows_at_once: in a step.
        seed: of their order.
        report: called with the steps done, and their total.
    """
    say = report or (lambda done, total: None)
    student = _Student(model, stored)
    held = max(1, len(windows) // HELD_BACK)
    training, proof = (windows[:-held], windows[-held:]) if len(windows) > 1 else (windows, windows)
    before = _divergence(student, original, proof)
    start = {name: value.detach().clone() for name, value in _parameters(student).items()}
    optimizer, scheduler = _optimizer(student, steps)
    order = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for step in range(steps):
        say(step, steps)
        optimizer.zero_grad(set_to_none=True)
        chosen: list[int] = []
        while len(chosen) < min(windows_at_once, len(training)):
            queue = queue or torch.randperm(len(training), generator=order).tolist()
            chosen.append(queue.pop())
        for window in chosen:
            ids = training[window][None].to(_device(model))
            with torch.no_grad():
                want = original(input_ids=ids, use_cache=False).logits
            with torch.enable_grad():
                loss = kl(want, student(ids)) / len(chosen)
                loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        for module in model.modules():
            if isinstance(module, TunableLinear):
                module.confine()
    say(steps, steps)
    after = _divergence(student, original, proof)
    kept = after < before
    if not kept:
        with torch.no_grad():
            for name, parameter in _parameters(student).items():
                parameter.copy_(start[name])
    norms = {name: value.detach() for name, value in student.values().items()} if kept else {}
    student.requires_grad_(False)
    return Outcome(before, after, kept, norms)


def kl(original: Tensor, tuned: Tensor) -> Tensor:
    """Mean token `KL(original || tuned)` of logits `[..., vocabulary]`, nats, in float32.

    In parts, computed again for their gradients, so that only one is in memory at a time.
    """
    want, have = original.flatten(0, -2), tuned.flatten(0, -2)
    total = have.new_zeros((), dtype=torch.float32)
    for start in range(0, len(want), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        total = total + checkpoint(_kl_sum, want[part], have[part], use_reentrant=False)
    return total / len(want)


def _kl_sum(want: Tensor, have: Tensor) -> Tensor:
    p, q = want.float().log_softmax(-1), have.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum()


def _optimizer(
    student: _Student, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    groups: list[dict[str, Any]] = []
    for kind, parameters in learnable(student.model).items():
        for parameter in parameters:
            share = size_of(parameter) if kind == "factors" else 1.0
            groups.append({"params": [parameter], "lr": RATES[kind] * share})
    for vector in student.vectors:
        groups.append({"params": [vector], "lr": RATES["norms"] * max(size_of(vector), 1e-6)})
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for group in groups:
        group["params"][0].requires_grad_(True)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    rising = max(1, round(WARM_UP * steps))

    def rate(step: int) -> float:
        return min((step + 1) / rising, (steps - step) / max(1, steps - rising))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def _parameters(student: _Student) -> dict[str, nn.Parameter]:
    """What tuning may change."""
    tunable = {id(p) for ps in learnable(student.model).values() for p in ps}
    own = {id(p) for p in student.vectors}
    return {name: p for name, p in student.named_parameters() if id(p) in tunable | own}


@torch.no_grad()
def _divergence(student: _Student, original: PreTrainedModel, windows: Tensor) -> float:
    total = 0.0
    for window in windows:
        ids = window[None].to(_device(student.model))
        total += float(kl(original(input_ids=ids, use_cache=False).logits, student(ids)))
    return total / len(windows)


def _device(model: PreTrainedModel) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device
