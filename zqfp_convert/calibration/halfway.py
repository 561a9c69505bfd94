"""Leaves behind what is done of a block: hidden states move on to a place within it.

Most blocks add what attention makes to the hidden states, and then what the rest makes of the sum.
Once the linears of attention are quantized, the sum can stand for the hidden states: the block
without attention makes of it what the whole block makes of them. Whether that is so, bit for bit,
is tried out on the block itself.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, MutableMapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zqfp_convert.calibration.stream import Call, Stream, inputs_of, stop_at
from zqfp_convert.errors import SourceError
from zqfp_convert.model.blocks import others


@dataclass(frozen=True)
class Halfway:
    """A place in a block.

    Attributes:
        entrance: the child whose input can stand for the block's.
        before: the children before it, in the order of their calls.
        added: those of them whose outputs are in that input already, and how many outputs they have
            beside it (None for a bare tensor). On the others' outputs nothing depends any more.
    """

    entrance: str
    before: tuple[str, ...]
    added: dict[str, int | None]

    @contextmanager
    def moves(self, block: nn.Module, stream: Stream, index: int) -> Iterator[None]:
        """While this context is open, a batch of the stream moves here as the block runs on it."""
        hidden = stream.hidden[index]

        def move(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream.hidden[index] = _tensor(args, kwargs).view(hidden.shape)

        child = block.get_submodule(self.entrance)
        handle = child.register_forward_pre_hook(move, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def leave(self, block: nn.Module) -> None:
        """Let the block run from here on, with hidden states that have moved here."""
        for name in self.before:
            zeros = _Zeros(self.added[name]) if name in self.added else nn.Identity()
            setattr(block, name, zeros)


@dataclass(frozen=True)
class Shortcut:
    """A way to a place without computing what a linear before it is given, which was kept.

    Attributes:
        place: where it leads.
        child: a child of the block, which returns what the linear makes.
        linear: the last one that runs in the child.
        inputs: what it was given, for each batch.
    """

    place: Halfway
    child: str
    linear: str
    inputs: list[Tensor] = field(default_factory=list)

    @contextmanager
    def taken(self, block: nn.Module) -> Iterator[None]:
        """While this context is open, the block makes use of the first batch's; it is let go of."""
        made = block.get_submodule(self.linear)(self.inputs.pop(0))
        led = self.place.before[: self.place.before.index(self.child)]
        own = {name: block.get_submodule(name) for name in (self.child, *led)}
        for name in led:
            setattr(block, name, nn.Identity())
        setattr(block, self.child, _Given(made, self.place.added[self.child]))
        try:
            yield
        finally:
            for name, module in own.items():
                setattr(block, name, module)


@dataclass(frozen=True)
class Moves:
    """How hidden states move within a block while statistics of a stage are collected.

    Attributes:
        place: before the stage, where the student's batches move to.
        by: a shortcut there, if there is one.
        ahead: behind the stage, where the original's do, whose linears have not to be solved first.
        keep: where the inputs of the stage's linears are put, if anywhere.
    """

    place: Halfway | None = None
    by: Shortcut | None = None
    ahead: Halfway | None = None
    keep: list[Tensor] | None = None

    @contextmanager
    def of_student(self, block: nn.Module, stream: Stream, index: int) -> Iterator[None]:
        """While this context is open, a batch of the stream moves as the block runs on it."""
        with ExitStack() as stack:
            if self.place is not None:
                stack.enter_context(self.place.moves(block, stream, index))
            if self.by is not None:
                stack.enter_context(self.by.taken(block))
            yield


NOWHERE = Moves()


class _Given(nn.Module):
    """Stands in for a module whose output is known."""

    def __init__(self, output: Tensor, beside: int | None) -> None:
        super().__init__()
        self._output, self._beside = output, beside

    def forward(self, *args: Any, **kwargs: Any) -> object:
        """It, in the form of the module's outputs."""
        return _in_form(self._output, self._beside)


class _Zeros(nn.Module):
    """Stands in for a module whose output has been added."""

    def __init__(self, beside: int | None) -> None:
        super().__init__()
        self._beside = beside

    def forward(self, *args: Any, **kwargs: Any) -> object:
        """Zeros of the first tensor's shape, in the form of the module's outputs."""
        return _in_form(torch.zeros_like(_tensor(args, kwargs)), self._beside)


def _in_form(output: Tensor, beside: int | None) -> object:
    return output if beside is None else (output, *[None] * beside)


def halfway(
    block: nn.Module,
    done: Collection[str],
    left: Collection[str],
    call: Call,
    hidden: Tensor,
) -> Halfway | None:
    """A place in a block behind linears that are done and before all that are left.

    None where hidden states cannot move to one, or blocks hand on more than hidden states.

    Args:
        done: names of linears of the block.
        left: likewise.
        hidden: a batch at its entrance.
    """
    containers = (MutableMapping, MutableSequence)
    if call.keep or any(isinstance(v, containers) for v in (*call.args, *call.kwargs.values())):
        return None
    children = [name for name, _ in block.named_children()]
    if not any(_within(child, done) and not _within(child, left) for child in children):
        return None  # seen without running anything
    seen, made = _watched(block, call, hidden)
    before: list[str] = []
    for name, child in seen.items():
        if child.given.numel() == hidden.numel():
            added = {one: seen[one].beside for one in before if _within(one, done)}
            found = Halfway(name, tuple(before), added)
            if added and _holds(found, block, call, child.given.view(hidden.shape), made):
                return found
        if child.again or _within(name, left):
            return None
        before.append(name)
    return None


def shortcut(
    place: Halfway, block: nn.Module, linears: Sequence[str], call: Call, hidden: Tensor
) -> Shortcut | None:
    """A shortcut to a place by the input that linears before it share, if there is one.

    Args:
        hidden: a batch at the entrance of the block; the two ways are compared by it.
    """
    if len(linears) != 1 or len(place.added) != 1:
        return None
    (linear,), (child,) = linears, place.added
    if not _within(child, linears):
        return None
    found = Shortcut(place, child, linear)
    around, by = Stream([hidden]), Stream([hidden])
    seen: dict[str, Tensor] = {}
    entrance = block.get_submodule(place.entrance)
    watched = inputs_of({found.linear: block.get_submodule(found.linear)}, seen)
    with watched, place.moves(block, around, 0), stop_at(entrance):
        call.run(block, hidden)
    found.inputs.append(seen.pop(found.linear))
    try:
        with found.taken(block), place.moves(block, by, 0), stop_at(entrance):
            call.run(block, hidden)
    except (torch.OutOfMemoryError, SourceError):
        raise
    except Exception:  # of the model's own lines, which may ask for anything
        return None
    return found if torch.equal(around.hidden[0], by.hidden[0]) else None


def _within(child: str, linears: Collection[str]) -> bool:
    return any(f"{linear}.".startswith(f"{child}.") for linear in linears)


@dataclass
class _Seen:
    """What a child is given, whether more than once, and what it returns beside a tensor."""

    given: Tensor
    again: bool = False
    beside: int | None = None


def _watched(block: nn.Module, call: Call, hidden: Tensor) -> tuple[dict[str, _Seen], Tensor]:
    """The children of a block in the order of their calls, and what it makes of hidden states."""
    seen: dict[str, _Seen] = {}

    def watch(name: str, child: nn.Module) -> list[RemovableHandle]:
        def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            again = name in seen
            seen.setdefault(name, _Seen(_tensor(args, kwargs))).again = again

        def returned(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            seen[name].beside = others(output)

        return [
            child.register_forward_pre_hook(called, with_kwargs=True),
            child.register_forward_hook(returned),
        ]

    handles = [one for name, child in block.named_children() for one in watch(name, child)]
    try:
        return seen, call.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()


def _holds(found: Halfway, block: nn.Module, call: Call, moved: Tensor, made: Tensor) -> bool:
    """Whether the block makes the same of the hidden states there, bit for bit."""
    rest = copy.copy(block)
    rest._modules = dict(block._modules)
    found.leave(rest)
    try:
        return torch.equal(call.run(rest, moved), made)
    except (torch.OutOfMemoryError, SourceError):
        raise
    except Exception:  # of the model's own lines, which may ask for anything
        return False


def _tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a module is given."""
    given = [
        *args,
        *(kwargs[name] for name in ("hidden_states",) if name in kwargs),
        *kwargs.values(),
    ]
    return next(value for value in given if isinstance(value, torch.Tensor))
