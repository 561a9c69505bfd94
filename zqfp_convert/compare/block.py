"""Quantizes the linears of one block by a configuration, in place.

Statistics are of the block before any of its linears is quantized, behind quantized blocks, as in
GPTQ's published code: one pass over the calibration windows serves all linears.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from zqfp_convert.calibration.stages import Calls, trace
from zqfp_convert.calibration.stream import inputs_of
from zqfp_convert.compare.activations import (
    ActivationQuantizer,
    Range,
    SimulatedLinear,
    smoothing,
)
from zqfp_convert.compare.configuration import Configuration
from zqfp_convert.compare.distillation import distill
from zqfp_convert.compare.formats import FORMATS, NONE
from zqfp_convert.compare.weights import placed_by, solve
from zqfp_convert.errors import SourceError
from zqfp_convert.model.blocks import bias_of, get_linear, linears, put, weight_matrix
from zqfp_convert.quantize.hessian import Curvature, HessianSum, prepare

DAMPING = 0.01  # GPTQ's (arXiv:2210.17323), section 3.3


def quantize_block(
    block: nn.Module,
    calls: Calls,
    hidden: list[Tensor],
    calibration: int,
    configuration: Configuration,
) -> int:
    """Replace the linears of a block by simulated ones.

    Args:
        block: with its weights.
        calls: with which arguments it is called, by batch.
        hidden: what enters it, `[batch, tokens, width]` for each batch, on the CPU.
        calibration: how many of the batches, from the first on, are for calibration.
        configuration: what to make of it.

    Returns:
        The bits that the quantized weights take when stored; 0 where weights are left alone.

    Raises:
        SourceError: NaN or infinity among the activations.
    """
    device = next(block.parameters()).device
    names = [name for name, _ in linears(block)]
    stages = trace(block, names, calls(0), hidden[0].to(device))

    def each(look: Callable[[str, Tensor], None]) -> None:
        seen: dict[str, Tensor] = {}
        first = {stage[0]: block.get_submodule(stage[0]) for stage in stages}
        for index in range(calibration):
            with inputs_of(first, seen):
                calls(index).run(block, hidden[index].to(device))
            for name in first:
                look(name, seen[name])

    ranges = _ranges(each) if configuration.observes else {}
    quantizers = {
        stage[0]: _quantizer(block, stage, ranges.get(stage[0]), configuration) for stage in stages
    }
    curvatures = _curvatures(each, quantizers) if configuration.solves else {}
    weights = {
        name: _divided(weight_matrix(get_linear(block, name)), quantizers[stage[0]])
        for stage in stages
        for name in stage
    }
    if configuration.trains:
        own = {name: quantizers[stage[0]] for stage in stages for name in stage}
        grid = partial(placed_by, configuration)
        weights = distill(block, weights, own, grid, calls, hidden[:calibration])
    bits = 0
    for stage in stages:
        for name in stage:
            linear, weight = get_linear(block, name), weights[name]
            if configuration.weights != NONE:
                weight, taken = solve(weight, curvatures.get(stage[0]), configuration)
                bits += taken
            dtype = weight_matrix(linear).dtype
            simulated = SimulatedLinear(weight.to(dtype), bias_of(linear), quantizers[stage[0]])
            put(block, name, simulated)
    return bits


def _divided(weight: Tensor, quantizer: ActivationQuantizer) -> Tensor:
    """The weight, float32 `[N, K]`, for inputs that the quantizer divides."""
    return weight.float() if quantizer.divisor is None else weight.float() * quantizer.divisor


def _quantizer(
    block: nn.Module, stage: list[str], seen: Range | None, configuration: Configuration
) -> ActivationQuantizer:
    """The quantizer of the input that the linears of a stage share."""
    divisor = None
    if configuration.smooth > 0:
        assert seen is not None
        weights = [weight_matrix(get_linear(block, name)) for name in stage]
        divisor = smoothing(seen, weights, configuration.smooth)
    static = configuration.activation_scale == "tensor"
    form = FORMATS.get(configuration.activations)
    return ActivationQuantizer.make(form, divisor, seen if static else None)


def _ranges(each: Callable[[Callable[[str, Tensor], None]], None]) -> dict[str, Range]:
    found: dict[str, Range] = {}

    def look(name: str, inputs: Tensor) -> None:
        new = Range.of(inputs)
        found[name] = found[name].joined(new) if name in found else new

    each(look)
    return found


def _curvatures(
    each: Callable[[Callable[[str, Tensor], None]], None],
    quantizers: dict[str, ActivationQuantizer],
) -> dict[str, Curvature]:
    sums: dict[str, HessianSum] = {}

    def look(name: str, inputs: Tensor) -> None:
        if name not in sums:
            sums[name] = HessianSum(inputs.shape[-1], cross=False, device=inputs.device)
        sums[name].add(quantizers[name](inputs))

    each(look)
    found = {}
    for name, total in sums.items():
        hessian = total.mean()[0]
        if not bool(torch.isfinite(hessian).all()):
            raise SourceError(
                name,
                "NaN or infinity among its calibration activations",
                needed="finite activations",
                do="Try --device cpu (float32); if it persists, the model or the text is at fault.",
            )
        found[name] = prepare(hessian, None, damping=DAMPING, activation_order=False)
    return found
