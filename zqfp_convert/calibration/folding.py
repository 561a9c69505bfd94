"""Moving a factor or a mean from a norm into the linears behind it, proved on the spot.

Both change tensors of a block so that it computes what it did, wherever every consumer of the norm
is a linear that can take its part. That is proved for each norm by comparing float64 outputs, not
assumed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zqfp_convert.calibration.stream import Call, inputs_of
from zqfp_convert.model.experts import StandIn, mixtures

# Relative. Some models take a softmax or a norm in float32 whatever they are given, which leaves
# 1e-7; a fold that is not exact is off by far more.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Change:
    """A tensor that the folding made: name in the block, value, and what the manifest calls it."""

    name: str
    value: Tensor
    kind: str


def norms_of(
    block: nn.Module | Mapping[str, nn.Module], kind: str, parameter: str
) -> dict[str, nn.Module]:
    """The norms of a block whose class has `kind` in its name, and which have that parameter.

    Modules by their names can stand for the block.
    """
    modules = block.named_modules() if isinstance(block, nn.Module) else block.items()
    return {
        name: module
        for name, module in modules
        if kind in type(module).__name__
        and isinstance(getattr(module, parameter, None), nn.Parameter)
    }


def consumers(
    block: nn.Module,
    norms: Mapping[str, nn.Module],
    quantized: set[str],
    call: Call,
    hidden: Tensor,
) -> dict[str, list[str]]:
    """The quantized linears that take each norm's output as it is."""
    outputs: dict[str, Any] = {}  # of some modules that are called norms: no tensor
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
            if isinstance(out, Tensor)
            and x.data_ptr() == out.data_ptr()
            and x.numel() == out.numel()
            and x.shape[-1] == out.shape[-1]  # not heads, normalized one by one
        )
        for name, out in outputs.items()
    } | {name: [] for name in norms.keys() - outputs.keys()}


def put(block: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give parameters of a block, by their dotted names, other values."""
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def same_function(
    block: nn.Module,
    values: Mapping[str, Tensor],
    proof: tuple[Call, Tensor],
    turn: Callable[[Tensor], Tensor] = lambda hidden: hidden,
) -> bool:
    """Whether a block with other values gives the same outputs in float64 on one batch.

    `turn` is what happens to the hidden states around the block with the other values.
    """
    call, hidden = proof
    # Experts that stay as they are need not run: what reaches them says it all.
    memo = {
        id(experts): StandIn()
        for path, experts in mixtures(block).items()
        if not any(name.startswith(path + ".") for name in values)
    }
    before = copy.deepcopy(block, memo).double()
    after = copy.deepcopy(before)
    put(after, {name: value.double() for name, value in values.items()})
    call64 = _double(call)
    try:
        want = turn(call64.run(before, hidden.double()))
        have = call64.run(after, turn(hidden.double()))
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
        if isinstance(value, MutableMapping):  # a copy, as blocks fill it
            made = type(value)()
            made.update({key: widen(element) for key, element in value.items()})
            return made
        return value

    kwargs = {key: widen(value) for key, value in call.kwargs.items()}
    return Call(tuple(widen(value) for value in call.args), kwargs)
