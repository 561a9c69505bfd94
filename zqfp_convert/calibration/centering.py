"""Folds the mean of LayerNorm outputs into biases, so that FP8 spends its bits on what varies.

With `y = LayerNorm(x)` of mean `mu` and consumers `W y + b`, the norm's bias gives up `mu` and each
consumer's bias gets `W mu`: the same function, wherever every consumer is a linear whose bias
can take it. That is proved for each norm by comparing float64 outputs, not assumed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zqfp_convert.calibration.stages import Calls
from zqfp_convert.calibration.stream import Call, Stream, inputs_of
from zqfp_convert.model.blocks import bias_of, get_linear, weight_matrix

# Relative. Some models take a softmax or a norm in float32 whatever they are given, which leaves
# 1e-7; a fold that is not exact is off by the mean itself.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Change:
    """A tensor that the folding made: name in the block, value, and what the manifest calls it."""

    name: str
    value: Tensor
    kind: str


def center_norms(
    block: nn.Module, quantized: set[str], stream: Stream, calls: Calls, dtype: torch.dtype
) -> list[Change]:
    """Fold every LayerNorm of a block whose consumers are all linears of `quantized`.

    The block is changed in place. Norm biases stay values of `dtype`, that of the file, and the
    mean is what they lose by the change, so nothing is rounded away; linear biases are to be
    written in float32.

    Returns:
        What has to be written otherwise than the source has it.
    """
    norms = {
        name: module
        for name, module in block.named_modules()
        if "LayerNorm" in type(module).__name__
        and isinstance(getattr(module, "bias", None), nn.Parameter)
    }
    if not norms:
        return []
    consumers = _consumers(block, norms, quantized, calls(0), stream.hidden[0])
    means = _means(block, norms, stream, calls)
    changes: list[Change] = []
    for name in norms:
        if consumers[name]:
            proof = calls(0), stream.hidden[0]
            changes += _fold(block, name, consumers[name], means[name], dtype, proof)
    return changes


def _consumers(
    block: nn.Module, norms: dict[str, nn.Module], quantized: set[str], call: Call, hidden: Tensor
) -> dict[str, list[str]]:
    """The quantized linears that take each norm's output as it is."""
    outputs: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: outputs.update({name: out}))
        for name, module in norms.items()
    ]
    with inputs_of({name: block.get_submodule(name) for name in quantized}, seen):
        call.run(block, hidden)
    for handle in handles:
        handle.remove()
    return {
        name: sorted(
            linear
            for linear, x in seen.items()
            if x.data_ptr() == out.data_ptr() and x.numel() == out.numel()
        )
        for name, out in outputs.items()
    } | {name: [] for name in norms.keys() - outputs.keys()}


def _means(
    block: nn.Module, norms: dict[str, nn.Module], stream: Stream, calls: Calls
) -> dict[str, Tensor]:
    """The mean output of each norm over all tokens, float64 `[width]`."""
    sums: dict[str, Tensor] = {}
    count = 0

    def add(name: str, out: Tensor) -> None:
        total = out.double().flatten(0, -2).sum(0)
        sums[name] = sums[name] + total if name in sums else total

    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: add(name, out))
        for name, module in norms.items()
    ]
    for index, hidden in enumerate(stream.hidden):
        calls(index).run(block, hidden)
        count += hidden.shape[0] * hidden.shape[1]
    for handle in handles:
        handle.remove()
    return {name: total / count for name, total in sums.items()}


def _fold(
    block: nn.Module,
    name: str,
    linears: list[str],
    mean: Tensor,
    dtype: torch.dtype,
    proof: tuple[Call, Tensor],
) -> list[Change]:
    norm = block.get_submodule(name)
    old = norm.get_parameter("bias").data
    new = (old.double() - mean).to(dtype).to(old.dtype)
    taken = old.double() - new.double()  # the mean, as the norm's bias can express it
    biases: dict[str, Tensor] = {}
    for path in linears:
        linear = get_linear(block, path)
        before = bias_of(linear)
        moved = weight_matrix(linear).double() @ taken
        biases[path] = moved if before is None else moved + before.double()
    if not _same_function(block, name, new, biases, proof):
        return []
    changes = [Change(f"{name}.bias", new.to(dtype), "norm_changed")]
    norm.bias = nn.Parameter(new, requires_grad=False)
    for path, bias in biases.items():
        linear = get_linear(block, path)
        kind = "bias_added" if bias_of(linear) is None else "bias_changed"
        linear.bias = nn.Parameter(bias.to(old.dtype), requires_grad=False)
        changes.append(Change(f"{path}.bias", bias.float(), kind))
    return changes


def _same_function(
    block: nn.Module,
    norm: str,
    norm_bias: Tensor,
    biases: dict[str, Tensor],
    proof: tuple[Call, Tensor],
) -> bool:
    """Whether the folded block gives the same outputs in float64 on one batch."""
    call, hidden = proof
    before = copy.deepcopy(block).double()
    after = copy.deepcopy(before)
    after.get_submodule(norm).bias = nn.Parameter(norm_bias.double(), requires_grad=False)
    for linear, bias in biases.items():
        after.get_submodule(linear).bias = nn.Parameter(bias, requires_grad=False)
    call64 = _double(call)
    try:
        want = call64.run(before, hidden.double())
        have = call64.run(after, hidden.double())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a block that insists on another dtype: nothing is proved, nothing folded
        return False
    return bool((want - have).abs().max() <= TOLERANCE * want.abs().max())


def _double(call: Call) -> Call:
    """The call with its floating tensors in float64."""

    def widen(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.double()
        if isinstance(value, (tuple, list)):
            return type(value)(widen(element) for element in value)
        return value

    kwargs = {key: widen(value) for key, value in call.kwargs.items()}
    return Call(tuple(widen(value) for value in call.args), kwargs)
