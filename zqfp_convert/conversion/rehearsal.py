"""Whether to rotate the residual stream: both ways are tried, and what is closer is taken.

A rehearsal carries some windows through the original and through a model whose weights are rounded
to nearest, activations in FP8, block by block; so it does with both rotated. Each block is read
once for all four.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from zqfp_convert.calibration.rotating import find_rotation
from zqfp_convert.calibration.simulated import SimulatedLinear
from zqfp_convert.calibration.stream import Entrance, Stream, batches_of
from zqfp_convert.checkpoint.source.rotated import RotatedShards, Rotation
from zqfp_convert.conversion import host
from zqfp_convert.conversion.ahead import read_ahead
from zqfp_convert.conversion.block import fill, fill_outside, fold, rounded
from zqfp_convert.distill.train import kl
from zqfp_convert.errors import OptionError, OutputError, SourceError
from zqfp_convert.model import skeleton
from zqfp_convert.model.blocks import bias_of, get_linear, put, weight_matrix
from zqfp_convert.model.experts import mixtures
from zqfp_convert.model.head import Head
from zqfp_convert.parallel import lacking
from zqfp_convert.plan import TOKENS_AT_ONCE, Plan, rotated

WINDOWS, WINDOW = 4, 1024  # tokens of each
WORTH = 0.95  # a rotation has to bring the KL below this share
LEFT = 0.7  # of rounding errors: a conversion, which does not just round, halves their energy
SAME = 0.1  # of the KL by quantization: what the rotation itself may cost, rounding included

Report = Callable[[str, int, int], None]


class _Rehearsal:
    """A model's hidden states on their way through its blocks, as it is and with rounded weights.

    Attributes:
        original, quantized: the two streams.
        rotation: that the model allows, once the first block is there.
    """

    def __init__(self, plan: Plan, windows: Tensor, size: int) -> None:
        """With `size` windows at once."""
        fill_outside(plan)
        self._plan = plan
        batches = batches_of(windows, size * windows.shape[1], plan.device)
        self._first = batches[0][:1]
        self._entrance = Entrance(plan.blocks, batches)
        self._block: nn.Module | None = None
        self.original = Stream(self._entrance.first())
        self.quantized = Stream(list(self.original.hidden))

    def fill(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Give a block its weights, by their names on disk.

        That is a copy of the plan's, which stays as it is: what would be put into its place each
        time, small as it is, would lie among large tensors and leave holes in the heap.
        """
        plan = self._plan
        self._block = copy.deepcopy(plan.blocks.modules[index])
        prefix = plan.blocks.name(index) + "."
        fill(plan, self._block, prefix, plan.block_tensors(index), tensors)
        self._entrance.try_block(index, self._block)

    def find_rotation(self) -> Rotation | None:
        """That of the residual stream which the model allows, by the first block."""
        plan = self._plan
        if self._entrance.hands_on:  # what blocks hand on is one for both streams
            return None
        try:  # else logits cannot be compared
            self.head().check(self.original.hidden[0][:1], self._first)
        except SourceError:
            return None
        assert self._block is not None
        proof = self._block, self._entrance.calls(0)(0), self.original.hidden[0]
        return find_rotation(plan.model, plan.blocks, plan.names, *proof)

    def step(self, index: int) -> None:
        """Move both streams through the block that has been filled."""
        plan, block = self._plan, self._block
        assert block is not None
        calls = self._entrance.calls(index)
        self.original.advance(block, calls)
        quantized = copy.deepcopy(block)
        fold(plan, index, quantized, self.quantized, calls)  # may add biases, so not to the block
        for layer in plan.layers[index]:
            linear = get_linear(quantized, layer.place)
            weight = weight_matrix(linear)
            error = rounded(plan, weight, scales="free", scale_rounding="nearest") - weight.float()
            simulated = (weight + LEFT * error).to(weight.dtype)
            put(quantized, layer.place, SimulatedLinear(simulated, bias_of(linear)))
        self.quantized.advance(quantized, calls)
        self._block = None

    def head(self) -> Head:
        """What makes logits of the streams behind the last block."""
        plan = self._plan
        return Head(plan.model, plan.blocks, returns=self._entrance.returns)


def choose_rotation(plan: Plan, windows: Tensor, report: Report) -> Plan:
    """The plan, with a rotated residual stream if the recipe says so or it is closer then.

    Args:
        windows: of calibration, int64 `[samples, seq_len]`.
        report: is told how far it is, and if a rotation is not tried for want of disk.

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
    turned = _rehearse_what_fits(plan, windows[:WINDOWS, :WINDOW], report)
    return as_it_is if turned is None else turned


def _rehearse_what_fits(plan: Plan, windows: Tensor, report: Report) -> Plan | None:
    """`_rehearse`, again with half the windows at once as often as memory does not suffice."""
    size = max(1, TOKENS_AT_ONCE[plan.device.type] // windows.shape[1])
    while True:
        try:
            with lacking():
                return _rehearse(plan, windows, size, report)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        skeleton.empty(plan.model)
        host.give_back(plan.device)
        size = min(size, len(windows)) // 2 or 1


@torch.no_grad()
def _rehearse(plan: Plan, windows: Tensor, size: int, report: Report) -> Plan | None:
    """The rotated plan, or None where it is not to be; raises as `choose_rotation`."""
    wanted, count = plan.recipe.rotation, len(plan.blocks.modules)
    plain = _Rehearsal(plan, windows, size)
    groups = [plan.block_tensors(index) for index in range(count)]
    turned, other = plan, plain
    for index, tensors in enumerate(read_ahead(plan.source.shards, groups, plan.device)):
        report(f"rehearsing, block {index + 1}/{count}", 0, plan.weights)
        host.tidy()
        plain.fill(index, tensors)
        if index == 0:
            rotation = plain.find_rotation()
            if rotation is None:
                _check_possible(plan)
                return None
            try:
                turned = rotated(plan, rotation)
            except OutputError:
                if wanted != "auto":
                    raise
                report("no rotation: no room on the disk for the head", 0, plan.weights)
                return None
            other = _Rehearsal(turned, windows, size)
        plain.step(index)
        shards = turned.source.shards
        assert isinstance(shards, RotatedShards)
        other.fill(index, shards.turn(groups[index], tensors, plan.device))
        other.step(index)
    original = plain.head(), plain.original.hidden
    turned_head = other.head()
    loss = _divergence(original, (plain.head(), plain.quantized.hidden))
    allowed = _divergence(original, (turned_head, other.original.hidden)) < SAME * loss
    closer = _divergence(original, (turned_head, other.quantized.hidden)) < WORTH * loss
    chosen = allowed and (closer or wanted == "residual")
    skeleton.empty(plan.model if chosen else turned.model)
    if chosen or allowed or wanted == "auto":
        return turned if chosen else None
    raise OptionError(
        "rotation",
        "'residual', and logits that are not the original's any more",
        needed=f"rounding of rotated weights to {plan.dtype} that costs little",
        do="Choose --rotation none, or auto; or --device cpu, which computes in float32.",
    )


def _check_possible(plan: Plan) -> None:
    """Refuse to go on where a rotation is wanted that the model does not allow."""
    if plan.recipe.rotation == "residual":
        raise OptionError(
            "rotation",
            f"'residual' for {type(plan.model).__name__}",
            needed="a decoder whose blocks read their residual stream through norms alone",
            do="Choose --rotation none, or auto.",
        )


def _divergence(
    original: tuple[Head, Sequence[Tensor]], other: tuple[Head, Sequence[Tensor]]
) -> float:
    """Mean token KL, nats."""
    total, tokens = 0.0, 0
    for want, have in zip(original[1], other[1], strict=True):
        wanted, hidden = want.flatten(0, 1), have.flatten(0, 1)
        total += float(kl(original[0].logits, other[0].logits, wanted, hidden)) * len(wanted)
        tokens += len(wanted)
    return total / tokens
