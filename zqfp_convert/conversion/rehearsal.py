"""Whether to rotate the residual stream: both ways are tried, and what is closer is taken.

A rehearsal carries some windows through the original and through a model whose weights are rounded
to nearest, activations in FP8, block by block. It takes a small part of a conversion's time.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zqfp_convert.calibration.rotating import find_rotation
from zqfp_convert.calibration.simulated import SimulatedLinear
from zqfp_convert.calibration.stream import Entrance, Stream, batches_of
from zqfp_convert.checkpoint.rotated import Rotation
from zqfp_convert.conversion.block import fill, fill_outside, fold, rounded
from zqfp_convert.distill.train import kl
from zqfp_convert.errors import OptionError, OutputError
from zqfp_convert.model import skeleton
from zqfp_convert.model.blocks import bias_of, get_linear, put, weight_matrix
from zqfp_convert.model.experts import mixtures
from zqfp_convert.model.head import Head
from zqfp_convert.plan import TOKENS_AT_ONCE, Plan, rotated

WINDOWS, WINDOW = 4, 1024  # tokens of each
WORTH = 0.95  # a rotation has to bring the KL below this share
LEFT = 0.7  # of rounding errors: a conversion, which does not just round, halves their energy
SAME = 0.1  # of the KL by quantization: what the rotation itself may cost, rounding included

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Rehearsed:
    """Hidden states behind the last block, and what makes logits of them."""

    original: list[Tensor]
    quantized: list[Tensor]
    head: Head
    rotation: Rotation | None


def choose_rotation(plan: Plan, windows: Tensor, report: Report) -> Plan:
    """The plan, with a rotated residual stream if the recipe says so or it is closer then.

    Args:
        windows: of calibration, int64 `[samples, seq_len]`.

    Raises:
        OptionError: the recipe wants a rotation that this model does not allow.
        OutputError: it wants one, and the model does not fit the disk then.
    """
    wanted = plan.recipe.rotation
    if wanted == "none":
        return plan
    as_it_is = dataclasses.replace(plan, recipe=plan.recipe.changed(rotation="none"))
    if wanted == "auto" and any(mixtures(block) for block in plan.blocks.modules):
        return as_it_is  # a rotation is not known there, see `find_rotation`: no need to rehearse
    some = windows[:WINDOWS, :WINDOW]
    report("rehearsing", 0, plan.weights)
    plain = _rehearse(plan, some)
    if plain.rotation is not None:
        report("rehearsing, rotated", 0, plan.weights)
        try:
            turned = rotated(plan, plain.rotation)
        except OutputError:
            if wanted == "auto":
                return as_it_is
            raise
        other = _rehearse(turned, some)
        original = plain.head, plain.original
        loss = _divergence(original, (plain.head, plain.quantized))
        allowed = _divergence(original, (other.head, other.original)) < SAME * loss
        closer = _divergence(original, (other.head, other.quantized)) < WORTH * loss
        chosen = allowed and (closer or wanted == "residual")
        skeleton.empty(plan.model if chosen else turned.model)
        if chosen:
            return turned
        if allowed or wanted == "auto":
            return as_it_is
        raise OptionError(
            "rotation",
            "'residual', and logits that are not the original's any more",
            needed=f"rounding of rotated weights to {plan.dtype} that costs little",
            do="Choose --rotation none, or auto; or --device cpu, which computes in float32.",
        )
    if wanted == "residual":
        raise OptionError(
            "rotation",
            f"'residual' for {type(plan.model).__name__}",
            needed="a decoder whose blocks read their residual stream through norms alone",
            do="Choose --rotation none, or auto.",
        )
    return as_it_is


@torch.no_grad()
def _rehearse(plan: Plan, windows: Tensor) -> _Rehearsed:
    fill_outside(plan)
    batches = batches_of(windows, TOKENS_AT_ONCE[plan.device.type], plan.device)
    entrance = Entrance(plan.blocks, batches)
    teacher = Stream(entrance.first())
    student = Stream(list(teacher.hidden))
    rotation = None
    for index, block in enumerate(plan.blocks.modules):
        fill(plan, block, plan.blocks.name(index) + ".", plan.block_tensors(index))
        if index == 0:
            entrance.try_first(block)
        calls = entrance.calls(index)
        if index == 0 and plan.rotation is None:
            proof = calls(0), teacher.hidden[0]
            rotation = find_rotation(plan.model, plan.blocks, plan.names, *proof)
        teacher.advance(block, calls)
        quantized = copy.deepcopy(block)
        fold(plan, index, quantized, student, calls)  # may add biases, so not to the block itself
        for layer in plan.layers[index]:
            linear = get_linear(quantized, layer.place)
            weight = weight_matrix(linear)
            error = rounded(plan, weight, scales="free", scale_rounding="nearest") - weight.float()
            simulated = (weight + LEFT * error).to(weight.dtype)
            put(quantized, layer.place, SimulatedLinear(simulated, bias_of(linear)))
        student.advance(quantized, calls)
        skeleton.empty(block)
    head = Head(plan.model, plan.blocks, returns_tuple=entrance.returns_tuple)
    return _Rehearsed(teacher.hidden, student.hidden, head, rotation)


def _divergence(original: tuple[Head, list[Tensor]], other: tuple[Head, list[Tensor]]) -> float:
    """Mean token KL, nats."""
    total, tokens = 0.0, 0
    for want, have in zip(original[1], other[1], strict=True):
        wanted, hidden = want.flatten(0, 1), have.flatten(0, 1)
        total += float(kl(original[0].logits, other[0].logits, wanted, hidden)) * len(wanted)
        tokens += len(wanted)
    return total / tokens
