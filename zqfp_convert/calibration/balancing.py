"""Takes back what a norm's gains and the weights behind it have moved between each other.

A channel whose gain is 30 times too large and whose weights are 30 times too small computes what
its neighbours do, but its weights share scales with 30 times larger ones and are lost in FP4. FP8
activations, floating-point numbers, hardly care for a channel's size. So where the columns of the
weights behind a norm differ by far in size, powers of two bring them together, exactly, and the
norm's gains take the inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from zqfp_convert.calibration.folding import Change, consumers, norms_of, put, same_function
from zqfp_convert.calibration.stages import Calls
from zqfp_convert.calibration.stream import Call, Stream, inputs_of
from zqfp_convert.model.blocks import get_linear, is_transposed, weight_matrix
from zqfp_convert.numerics import fp8
from zqfp_convert.parallel import ALONE, World

FAR = 3  # powers of two between a column and the median one, from which on something is done
TOKENS = 2048  # that the error is measured on


@dataclass(frozen=True)
class Balanced:
    """A norm whose gains have gone over into the columns of linears.

    Attributes:
        norm: its name in the block.
        linears: theirs.
        columns: float32 `[K]`, powers of two that their weights' columns were multiplied with.
        changes: what has to be written otherwise than the source has it.
    """

    norm: str
    linears: list[str]
    columns: Tensor
    changes: list[Change]


def balance_norms(
    block: nn.Module,
    quantized: set[str],
    stream: Stream,
    calls: Calls,
    dtype: torch.dtype,
    rounded: Callable[[Tensor], Tensor],
    world: World = ALONE,
) -> list[Balanced]:
    """Balance every norm of a block whose consumers are all linears of `quantized`, if it pays.

    The block is changed in place. Gains stay values of `dtype`, that of the file.

    Args:
        rounded: a weight `[N, K]` as the format would have it, rounded to nearest.
        world: processes that have streams of their own, and balance the same.
    """
    norms = norms_of(block, "Norm", "weight")
    if not norms:
        return []
    call, hidden = calls(0), stream.hidden[0]
    found = consumers(block, norms, quantized, call, hidden)
    made = []
    for name, norm in norms.items():
        if not found[name]:
            continue
        columns = _columns(block, norm, found[name], dtype)
        if columns is None:
            continue
        judged = partial(_pays, block, found[name], columns, call, hidden, rounded)
        if not world.agree(judged):
            continue
        gains = {
            f"{name}.{leaf}": value / columns.to(value.dtype)
            for leaf, value in norm.named_parameters(recurse=False)
        }
        weights = {}
        for path in found[name]:
            linear = get_linear(block, path)
            factor = columns[:, None] if is_transposed(linear) else columns
            weight = linear.get_parameter("weight").data
            weights[f"{path}.weight"] = weight * factor.to(weight.dtype)
        if not world.every(partial(same_function, block, gains | weights, (call, hidden))):
            continue
        put(block, gains | weights)
        changes = [Change(key, value.to(dtype), "norm_changed") for key, value in gains.items()]
        made.append(Balanced(name, found[name], columns.float(), changes))
    return made


def _columns(
    block: nn.Module, norm: nn.Module, linears: list[str], dtype: torch.dtype
) -> Tensor | None:
    """Powers of two `[K]` that make all columns about as large; None if they nearly are."""
    squares = [weight_matrix(get_linear(block, path)).float().square() for path in linears]
    size = torch.cat(squares).mean(0).sqrt()
    used = (size > 0) & (norm.get_parameter("weight").data != 0)
    if not used.any():
        return None
    steps = (size[used].median() / size.where(used, size[used].median())).log2().round()
    columns = torch.exp2(steps)
    for value in norm.parameters(recurse=False):  # what the file's dtype cannot take stays
        moved = value.data / columns.to(value.dtype)
        exact = (moved.to(dtype).to(value.dtype) == moved) & moved.isfinite()
        columns = columns.where(exact, torch.ones_like(columns))
    return columns if columns.log2().abs().max() >= FAR else None


def _pays(
    block: nn.Module,
    linears: list[str],
    columns: Tensor,
    call: Call,
    hidden: Tensor,
    rounded: Callable[[Tensor], Tensor],
) -> bool:
    """Whether the outputs are closer, weights rounded to nearest and activations in FP8."""
    seen: dict[str, Tensor] = {}
    with inputs_of({linears[0]: block.get_submodule(linears[0])}, seen):
        call.run(block, hidden)
    x = seen[linears[0]].flatten(0, -2)[:TOKENS].float()
    errors = []
    for factor in (torch.ones_like(columns), columns):
        total = 0.0
        for path in linears:
            weight = weight_matrix(get_linear(block, path)).float()
            want = x @ weight.t()
            have = fp8.simulate(x / factor) @ rounded(weight * factor).t()
            total += float((have - want).square().sum() / want.square().sum().clamp_min(1e-30))
        errors.append(total)
    return errors[1] < errors[0]
