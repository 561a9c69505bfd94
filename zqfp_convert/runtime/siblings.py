"""Quantized linears that get the same input, multiplied at once by the first one that is called.

Models call their projections to queries, keys and values one after another. At once they are one
launch, the activations are quantized once, and the small ones share the GPU with the large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zqfp_convert.runtime.kernels.hopper.linear import HopperWeights, multiply_all, together
from zqfp_convert.runtime.linear import QuantizedLinear

# Names of modules that models give the same input; whether one does is seen when it runs.
SETS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


@dataclass(frozen=True)
class Pending:
    """Outputs that wait for their members.

    Attributes:
        x: the input, as the members get it.
        version: how often it had been written to.
        outputs: `[M, N]` of each member; None where it has been taken.
    """

    x: Tensor
    version: int
    outputs: list[Tensor | None]


class Siblings:
    """Some linears, and what the first one has done for the others.

    Its members may be called in any order, or not at all: an output is only ever taken for the very
    input that it was made of.
    """

    def __init__(self, members: list[QuantizedLinear]) -> None:
        self.members = members
        self.pending: Pending | None = None
        self.apart = False  # they turned out to get inputs of their own

    def output(self, member: int, x: Tensor, way: str, scratch: int) -> Tensor | None:
        """`[M, N]` of a member for x `[..., K]`; None if it has to multiply by itself."""
        y = self._take(member, x)
        if y is not None or self.apart:
            return y
        weights = [one.arranged for one in self.members]
        hopper = [one for one in weights if isinstance(one, HopperWeights)]
        if len(hopper) < len(weights) or not together(hopper):
            return None
        outputs = multiply_all(hopper, x.reshape(-1, x.shape[-1]), way, scratch)
        return self._leave(member, x, _version(x), [*outputs])

    def _take(self, member: int, x: Tensor) -> Tensor | None:
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        y = pending.outputs[member]
        if y is None:  # called again: those of the others are left from before
            return None
        if pending.x is not x:
            self.apart = True
            return None
        if pending.version != _version(x):
            return None
        return self._leave(member, x, pending.version, pending.outputs)

    def _leave(
        self, member: int, x: Tensor, version: int, outputs: list[Tensor | None]
    ) -> Tensor | None:
        """A member's output; the others stay for theirs, if there are any."""
        left = [None if i == member else y for i, y in enumerate(outputs)]
        if any(y is not None for y in left):
            self.pending = Pending(x, version, left)
        return outputs[member]


def _version(x: Tensor) -> int:
    """How often a tensor has been written to; 0 where nobody counts."""
    if torch.compiler.is_compiling() or x.is_inference():
        return 0
    return x._version


def link(module: nn.Module) -> None:
    """Make siblings of the quantized linears in a module that may get the same input."""
    for parent in module.modules():
        for names in SETS:
            found = [getattr(parent, name, None) for name in names]
            members = [one for one in found if isinstance(one, QuantizedLinear)]
            if len(members) == len(names):
                siblings = Siblings(members)
                for place, member in enumerate(members):
                    member.join(siblings, place)
