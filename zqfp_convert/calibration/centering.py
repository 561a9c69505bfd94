"""Folds the mean of LayerNorm outputs into biases, so that FP8 spends its bits on what varies.

With `y = LayerNorm(x)` of mean `mu` and consumers `W y + b`, the norm's bias gives up `mu` and each
consumer's bias gets `W mu`: the same function, wherever every consumer is a linear whose bias
can take it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zqfp_convert.calibration.folding import Change, consumers, norms_of, put, same_function
from zqfp_convert.calibration.stages import Calls
from zqfp_convert.calibration.stream import Call, Stream
from zqfp_convert.model.blocks import bias_of, get_linear, weight_matrix
from zqfp_convert.parallel import ALONE, World


def center_norms(
    block: nn.Module,
    quantized: set[str],
    stream: Stream,
    calls: Calls,
    dtype: torch.dtype,
    world: World = ALONE,
) -> list[Change]:
    """Fold every LayerNorm of a block whose consumers are all linears of `quantized`.

    The block is changed in place. Norm biases stay values of `dtype`, that of the file, and the
    mean is what they lose by the change, so nothing is rounded away; linear biases are to be
    written in float32. Processes of a `world` have streams of their own, and fold the same.

    Returns:
        What has to be written otherwise than the source has it.
    """
    norms = norms_of(block, "LayerNorm", "bias")
    if not norms:
        return []
    found = consumers(block, norms, quantized, calls(0), stream.hidden[0])
    means = _means(block, norms, stream, calls, world)
    changes: list[Change] = []
    for name in norms:
        if found[name]:
            proof = calls(0), stream.hidden[0]
            changes += _fold(block, name, found[name], means[name], dtype, proof, world)
    return changes


def _means(
    block: nn.Module, norms: dict[str, nn.Module], stream: Stream, calls: Calls, world: World
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
    with world.attempt():
        for index, hidden in enumerate(stream.hidden):
            calls(index).run(block, hidden)
            count += hidden.shape[0] * hidden.shape[1]
    for handle in handles:
        handle.remove()
    count = round(world.total(count))
    return {name: world.sum_(total) / count for name, total in sums.items()}


def _fold(
    block: nn.Module,
    name: str,
    linears: list[str],
    mean: Tensor,
    dtype: torch.dtype,
    proof: tuple[Call, Tensor],
    world: World,
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
    values = {f"{path}.bias": bias for path, bias in biases.items()}
    if not world.every(lambda: same_function(block, {f"{name}.bias": new} | values, proof)):
        return []
    changes = [Change(f"{name}.bias", new.to(dtype), "norm_changed")]
    for path, bias in biases.items():
        kind = "bias_added" if bias_of(get_linear(block, path)) is None else "bias_changed"
        changes.append(Change(f"{path}.bias", bias.float(), kind))
    put(block, {f"{name}.bias": new})
    put(block, {key: bias.to(old.dtype) for key, bias in values.items()})
    return changes
