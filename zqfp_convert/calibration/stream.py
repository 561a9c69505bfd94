"""Hidden states of windows of tokens, carried from block to block.

The model never exists whole: for each block the decoder is run with its blocks stubbed out, only
to learn with which arguments it calls that block (masks, positions, rotary tables).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zqfp_convert.errors import SourceError
from zqfp_convert.model.blocks import Blocks, first_tensor


class _Reached(Exception):  # noqa: N818 (no error)
    """Leaves a forward pass once the wanted place is reached."""


@dataclass(frozen=True)
class Call:
    """The arguments that a decoder gives to one of its blocks, hidden states aside."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states `[batch, tokens, width]` that the block makes of others."""
        return first_tensor(block(hidden, *self.args, **self.kwargs))

    def same_as(self, other: Call) -> bool:
        """Whether the arguments are equal, as far as they are numbers, tensors and tuples."""
        return _same(self.args, other.args) and _same(self.kwargs, other.kwargs)


def _same(one: object, other: object) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, (type(None), bool, int, float, str)) and one == other


class Stream:
    """Batches of hidden states at the entrance of one block.

    Attributes:
        hidden: a tensor `[batch, tokens, width]` for each batch.
        moved: how many batches `advance` has moved; 0 again once all are.
    """

    def __init__(self, hidden: list[Tensor]) -> None:
        self.hidden = hidden
        self.moved = 0

    def move(self, block: nn.Module, call: Call) -> None:
        """Move the next batch through a block."""
        self.hidden[self.moved] = call.run(block, self.hidden[self.moved])
        self.moved += 1

    def advance(self, block: nn.Module, calls: Callable[[int], Call]) -> None:
        """Move all batches through a block that have not moved yet."""
        for index in range(self.moved, len(self.hidden)):
            self.move(block, calls(index))
        self.moved = 0

    def split(self, size: int) -> None:
        """Make batches of at most so many windows out of the larger ones."""
        self.hidden = [part for hidden in self.hidden for part in torch.split(hidden, size)]

    def checksum(self) -> int:
        """What tells these hidden states, to the bit, from nearly all others."""
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = (h.view(words[h.element_size()]).sum(dtype=torch.int64) for h in self.hidden)
        return sum(int(one) for one in sums)


class Entrance:
    """Learns with which arguments, and first with which hidden states, blocks are called."""

    def __init__(self, blocks: Blocks, batches: list[Tensor]) -> None:
        """`batches` are token ids, int64 `[batch, tokens]`, on the decoder's device.

        `returns_tuple` says what blocks return, once `try_first` has found out.
        """
        self._blocks, self._batches = blocks, batches
        self.returns_tuple = False

    def first(self) -> list[Tensor]:
        """The hidden states that enter the first block, for each batch."""
        return [self.enter(batch) for batch in range(len(self._batches))]

    def enter(self, batch: int) -> Tensor:
        """The hidden states `[batch, tokens, width]` that enter the first block, for one batch."""
        return self._record(0, batch)[1]

    def split(self, size: int) -> None:
        """Make batches of at most so many windows out of the larger ones."""
        self._batches = [part for batch in self._batches for part in torch.split(batch, size)]

    def calls(self, block: int) -> Callable[[int], Call]:
        """The arguments of a block's call, by the batch's index.

        Those that are the same for several batches are learnt once and kept.
        """
        known: dict[int, Call] = {}

        def call(batch: int) -> Call:
            if batch not in known:
                found = self._record(block, batch)[0]
                same = next((one for one in known.values() if one.same_as(found)), None)
                if known and same is None:
                    return found
                known[batch] = found if same is None else same
            return known[batch]

        return call

    def try_first(self, block: nn.Module) -> None:
        """Run the real first block once, so that stubs return what it does: a tensor or a tuple."""
        call, hidden = self._record(0, 0)
        self.returns_tuple = isinstance(block(hidden, *call.args, **call.kwargs), tuple)

    def _record(self, wanted: int, batch: int) -> tuple[Call, Tensor]:
        found: list[tuple[Call, Tensor]] = []
        passed: list[Tensor] = []

        def stub(index: int) -> Callable[..., object]:
            def forward(*args: Any, **kwargs: Any) -> object:
                if args:
                    hidden, rest = args[0], args[1:]
                else:
                    hidden, rest = kwargs.pop("hidden_states"), ()
                if passed and passed[-1] is not hidden:
                    raise SourceError(
                        f"{type(self._blocks.decoder).__name__}, {self._blocks.name(index)}",
                        "a block that is not fed what the block before it returns",
                        needed="a decoder that hands hidden states from block to block",
                        do="This architecture cannot be run block by block yet; converting with "
                        "--recipe fast does without.",
                    )
                passed.append(hidden)
                if index == wanted:
                    found.append((Call(rest, kwargs), hidden))
                    raise _Reached
                return (hidden,) if self.returns_tuple else hidden

            return forward

        modules = self._blocks.modules
        for index, module in enumerate(modules):
            module.forward = stub(index)
        try:
            self._blocks.decoder(input_ids=self._batches[batch], use_cache=False)
        except _Reached:
            pass
        finally:
            for module in modules:
                del module.forward
        assert found, "the decoder did not call its block"
        return found[0]


@contextmanager
def inputs_of(modules: dict[str, nn.Module], seen: dict[str, Tensor]) -> Iterator[None]:
    """While this context is open, the inputs of the modules are put into `seen` by name."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0]

        return record

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stop_at(module: nn.Module) -> Iterator[None]:
    """Runs the body until it calls `module`; nothing behind that call is computed."""

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Reached

    handle = module.register_forward_pre_hook(stop)
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()


def batches_of(windows: Tensor, tokens_at_once: int, device: torch.device) -> list[Tensor]:
    """Windows `[samples, seq_len]` in batches of at most so many tokens, at least one window."""
    size = max(1, tokens_at_once // windows.shape[1])
    return [windows[at : at + size].to(device) for at in range(0, len(windows), size)]
