"""The experts of a block as modules of their own, each with plain linears.

transformers keeps all experts of a block in one three-dimensional parameter; here each matrix is a
linear with a name, so that it is calibrated, quantized, stored and run like any other.
`unfused.py` puts these modules in the place of the fused ones and proves them equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
Activate = Callable[..., Tensor]


@dataclass(frozen=True)
class Fused:
    """A parameter that holds one or two matrices, or biases, of every expert.

    Attributes:
        parts: the linears whose matrices it holds, in the order in which they lie.
        leaf: what it holds of them, `weight` or `bias`.
        shape: of the parameter, experts first.
        transposed: whether matrices lie as `[K, N]`.
        interleaved: whether the rows of the parts take turns, instead of lying one part after
            another.
    """

    parts: tuple[str, ...]
    leaf: str
    shape: tuple[int, ...]
    transposed: bool
    interleaved: bool

    def part(self, stored: Tensor, number: int) -> Tensor:
        """Part `number` of what the parameter holds for one expert, as a linear has it."""
        rows = stored.t() if self.transposed and self.leaf == "weight" else stored
        count = len(self.parts)
        return rows[number::count] if self.interleaved else rows.chunk(count)[number]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """What the parameter holds for one expert, of its parts in their order."""
        rows = (
            torch.stack(list(parts), 1).flatten(0, 1) if self.interleaved else torch.cat([*parts])
        )
        return rows.t() if self.transposed and self.leaf == "weight" else rows


class ExpertLinear(nn.Linear):
    """A linear whose weight stays in the dtype that it is stored in, and is cast as it is used.

    So a block's experts are never all there in a wider dtype at once.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]` in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


class Expert(nn.Module):
    """`down_proj(activate(gate_proj x, up_proj x))`; without a gate `activate(up_proj x)`."""

    def __init__(self, linears: dict[str, nn.Linear], activate: Activate) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)
        self._gated, self._activate = GATE in linears, activate

    def forward(self, x: Tensor) -> Tensor:
        """`[tokens, width]` to the same shape."""
        inner = [getattr(self, GATE)(x)] if self._gated else []
        y: Tensor = getattr(self, DOWN)(self._activate(*inner, getattr(self, UP)(x)))
        return y


class Experts(nn.ModuleList):
    """The experts of a block, in order.

    Attributes:
        fused: the parameters of the original module that held them, by their names in it.
    """

    def __init__(self, experts: Iterable[Expert], fused: dict[str, Fused]) -> None:
        super().__init__(experts)
        self.fused = fused

    def rows(self, hidden: Tensor, *routing: Tensor) -> list[Tensor]:
        """For each expert the rows of `hidden` that are routed to it, int64.

        The arguments are those that the model calls the experts with.
        """
        raise NotImplementedError


class IndexedExperts(Experts):
    """Experts that are told which of them each token goes to, and with which weights."""

    def rows(self, hidden: Tensor, *routing: Tensor) -> list[Tensor]:
        """As in `Experts`; `routing` is what `forward` gets."""
        index = routing[0]
        return [found // index.shape[-1] for found in self._assigned(index)]

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum over each token's experts.

        Args:
            hidden: `[tokens, width]`.
            index: int64 `[tokens, k]`, experts of each token; numbers beyond the last are none.
            weights: `[tokens, k]`, of their outputs.
        """
        result, k = torch.zeros_like(hidden), index.shape[-1]
        for expert, assigned in zip(self, self._assigned(index), strict=True):
            if len(assigned):
                rows = assigned // k
                y = expert(hidden[rows]) * weights[rows, assigned % k, None]
                result.index_add_(0, rows, y.to(result.dtype))
        return result

    def _assigned(self, index: Tensor) -> list[Tensor]:
        """For each expert its places in the flattened index, in order; one wait for the device."""
        _leave_graph()
        flat = index.reshape(-1)
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=len(self)).tolist()
        return list(torch.split(order, counts))[: len(self)]


class SortedExperts(Experts):
    """Experts that get every token, one expert's after the other's, zeros for those not theirs.

    Tokens of zeros stay zeros, for these experts have no biases.
    """

    def rows(self, hidden: Tensor, *routing: Tensor) -> list[Tensor]:
        """As in `Experts`."""
        _leave_graph()
        each = hidden.view(len(self), -1, hidden.shape[-1])  # [experts, tokens, width]
        expert, token = each.ne(0).any(-1).nonzero(as_tuple=True)
        counts = expert.bincount(minlength=len(self)).tolist()
        return list(torch.split(expert * each.shape[1] + token, counts))

    def forward(self, hidden: Tensor) -> Tensor:
        """`[experts tokens, width]` to the same shape."""
        result = torch.zeros_like(hidden)
        for expert, rows in zip(self, self.rows(hidden), strict=True):
            if len(rows):
                result[rows] = expert(hidden[rows]).to(result.dtype)
        return result


def _leave_graph() -> None:
    """Which experts run is for the host to know: a compiled graph ends here, a whole one cannot be.

    torch.compile says so itself, but with errors of other kinds.
    """
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()


class StandIn(nn.Module):
    """Takes the place of experts where only what reaches them matters: hidden states, routing."""

    def forward(self, hidden: Tensor, *routing: Tensor) -> Tensor:
        """Hidden states, weighted with something that changes whenever the routing does."""
        if not routing:
            return hidden
        index, weights = routing
        return hidden * (weights.sum(-1) + index.sum(-1))[:, None].to(hidden.dtype)


def mixtures(module: nn.Module) -> dict[str, Experts]:
    """The experts in a module, by their names in it."""
    return {name: part for name, part in module.named_modules() if isinstance(part, Experts)}


def routers(module: nn.Module) -> set[str]:
    """Names of the linears that weigh or choose experts: they lie beside them.

    These are the linears with one output, or one for each expert, in the module that has the
    experts, and all in a module beside them that is called a router.
    """
    found = set()
    for path, experts in mixtures(module).items():
        parent = path.rpartition(".")[0]
        beside = module.get_submodule(parent)
        for name, part in beside.named_modules():
            place = f"{parent}.{name}".lstrip(".")
            if place == path or place.startswith(path + ".") or not isinstance(part, nn.Linear):
                continue
            owners = [
                beside.get_submodule(name.rsplit(".", up)[0]) for up in range(name.count("."))
            ]
            named = any("Router" in type(owner).__name__ for owner in [part, *owners])
            if named or part.out_features in (1, len(experts)):
                found.add(place)
    return found
