"""Quantized linears that get the same input, multiplied at once by the first one that is called.

Models call their projections to queries, keys and values one after another. At once they are one
launch, the activations are quantized once, and the small ones share the GPU with the large.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

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
        state: what else must not have changed, see `_state`.
        outputs: `[M, N]` of each member; None where it has been taken.
    """

    x: Tensor
    state: object
    outputs: list[Tensor | None]


class Siblings:
    """Some linears, and what the first one has done for the others.

    Its members may be called in any order, or not at all: an output is only taken for the very
    tensor that it was made of, as long as that has not been written to. Only where nobody counts
    that (inference tensors, and within torch.compile) a model must not write to an input between
    one member's call and another's; none is known that does.

    The members hold it, and it holds them weakly. A copy of a model has siblings of its own, which
    find one another when they are called.
    """

    def __init__(self, count: int) -> None:
        self.members: list[weakref.ref[QuantizedLinear] | None] = [None] * count
        self.pending: Pending | None = None
        self.apart = False  # they turned out to get inputs of their own, or some never to be called
        self._unused = 0  # times in a row that nobody took what was made

    def output(
        self, place: int, member: QuantizedLinear, x: Tensor, way: str, scratch: int
    ) -> Tensor | None:
        """`[M, N]` of a member for x `[..., K]`; None if it has to multiply by itself."""
        if not self._knows(place, member):
            return None
        state = _state(x, way)
        y = self._take(place, x, state)
        if y is not None or self.apart:
            return y
        weights = [self._weights(one) for one in self.members]
        hopper = [one for one in weights if one is not None]
        if len(hopper) < len(weights) or not together(hopper):
            return None
        outputs = multiply_all(hopper, x.reshape(-1, x.shape[-1]), way, scratch)
        return self._leave(place, x, state, [*outputs])

    def forget(self) -> None:
        """The members' weights change: what was made of them counts no more."""
        self.pending = None

    def _knows(self, place: int, member: QuantizedLinear) -> bool:
        known = self.members[place]
        if known is not None:
            found = known()
            if found is not None:
                return found is member  # a replica shares its original's siblings, and works alone
        if not torch.compiler.is_compiling():
            self.members[place] = weakref.ref(member)
        return False

    @staticmethod
    def _weights(member: weakref.ref[QuantizedLinear] | None) -> HopperWeights | None:
        if member is None:
            return None
        found = member()
        weights = None if found is None else found.arranged
        return weights if isinstance(weights, HopperWeights) else None

    def _take(self, place: int, x: Tensor, state: object) -> Tensor | None:
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        y = pending.outputs[place]
        if y is None:  # called again: those of the others are left from before
            untouched = all(one is not None for one in pending.outputs[:place])
            untouched = untouched and all(one is not None for one in pending.outputs[place + 1 :])
            self._unused = self._unused + 1 if untouched else 0
            self.apart = self._unused > 1
            return None
        self._unused = 0
        if pending.x is not x:
            self.apart = True
            return None
        if pending.state != state:
            return None
        return self._leave(place, x, state, pending.outputs)

    def _leave(
        self, place: int, x: Tensor, state: object, outputs: list[Tensor | None]
    ) -> Tensor | None:
        """A member's output; the others stay for theirs, if there are any."""
        left = [None if i == place else y for i, y in enumerate(outputs)]
        if any(y is not None for y in left):
            self.pending = Pending(x, state, left)
        return outputs[place]

    def __deepcopy__(self, memo: dict[int, Any]) -> Siblings:
        return memo.setdefault(id(self), Siblings(len(self.members)))  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[type[Siblings], tuple[int]]:
        return Siblings, (len(self.members),)


def _state(x: Tensor, way: str) -> object:
    """What has to be the same for an output to count: how often x was written to, and where to."""
    if torch.compiler.is_compiling():
        return way
    version = 0 if x.is_inference() else x._version
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return way, version, torch.is_inference_mode_enabled(), capturing


def link(module: nn.Module) -> None:
    """Make siblings of the quantized linears in a module that may get the same input."""
    for parent in module.modules():
        for names in SETS:
            found = [getattr(parent, name, None) for name in names]
            members = [one for one in found if isinstance(one, QuantizedLinear)]
            if len(members) == len(names):
                siblings = Siblings(len(members))
                siblings.members = [weakref.ref(member) for member in members]
                for place, member in enumerate(members):
                    member.join(siblings, place)
