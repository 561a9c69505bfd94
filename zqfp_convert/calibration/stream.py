"""Hidden states of windows of tokens, carried from block to block.

The model never exists whole: for each block the decoder is run with its blocks stubbed out, only
to learn with which arguments it calls that block (masks, positions, rotary tables).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, MutableSequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zqfp_convert.calibration.beside import Beside
from zqfp_convert.calibration.shelf import Shelf
from zqfp_convert.errors import SourceError
from zqfp_convert.model.blocks import Blocks, as_returned, first_tensor, others


class _Reached(Exception):  # noqa: N818 (no error)
    """Leaves a forward pass once the wanted place is reached."""


@dataclass(frozen=True)
class Call:
    """The arguments that a decoder gives to one of its blocks, hidden states aside."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keep: Callable[[object], None] | None = None  # is told what the block returns

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states `[batch, tokens, width]` that the block makes of others."""
        output = block(hidden, *self.args, **self.kwargs)
        if self.keep is not None:
            self.keep(output)
        return first_tensor(output)

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

    def __init__(self, hidden: MutableSequence[Tensor]) -> None:
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

    def split(self, size: int, dimension: int = 0) -> None:
        """Make batches of at most so many windows out of the larger ones; windows lie there."""
        if isinstance(self.hidden, Shelf):
            self.hidden.split(size, dimension)
            return
        parts = (torch.split(hidden, size, dimension) for hidden in self.hidden)
        self.hidden = [part for batch in parts for part in batch]

    def checksum(self) -> int:
        """What tells these hidden states, to the bit, from nearly all others."""
        sums = [_words(hidden).sum(dtype=torch.int64) for hidden in self.hidden]
        return sum(map(int, sums))  # now that all are on their way


def _words(hidden: Tensor) -> Tensor:
    """Hidden states as whole numbers, of 8 bytes each where their last dimension comes out even.

    Such need no conversion to be summed up, and their sums wrap around alike in any order. How the
    states lie in memory plays no part, as it may be another way when a conversion is gone on with.
    """
    size = hidden.element_size()
    if hidden.shape[-1] * size % 8:
        return hidden.view({2: torch.int16, 4: torch.int32}[size])
    if not hidden.is_contiguous() or hidden.storage_offset() * size % 8:
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    return hidden.view(torch.int64)


class Entrance:
    """Learns with which arguments, and first with which hidden states, blocks are called."""

    def __init__(self, blocks: Blocks, batches: list[Tensor]) -> None:
        """`batches` are token ids, int64 `[batch, tokens]`, on the decoder's device.

        `returns` says what blocks return, once `try_block` has found out.
        """
        self._blocks, self._batches = blocks, batches
        self.returns: dict[type[nn.Module], int | None] = {}
        self._beside = Beside()
        self._without: dict[nn.Module, Callable[[Tensor], Tensor]] = {}

    @property
    def hands_on(self) -> bool:
        """Whether blocks give later ones more than hidden states."""
        return self._beside.anything

    def first(self) -> list[Tensor]:
        """The hidden states that enter the first block, for each batch."""
        return [self.enter(batch) for batch in range(len(self._batches))]

    def dimension(self, hidden: Tensor) -> int:
        """In which dimension windows lie in hidden states of the first batch.

        The first, unless the model carries several copies of the states before it.
        """
        windows = tuple(self._batches[0].shape)
        fits = (at for at in range(hidden.ndim - 1) if hidden.shape[at : at + 2] == windows)
        return next(fits, 0)

    def enter(self, batch: int) -> Tensor:
        """The hidden states `[batch, tokens, width]` that enter the first block, for one batch."""
        return self._record(0, batch)[1]

    def do_without(self, embedding: nn.Module) -> bool:
        """Call the decoder without the embedding of tokens from now on, if blocks do not mind.

        For after the first states have entered: then only the shapes of what an embedding returns
        should matter. Returns whether they do, so that its weights may go.
        """
        last = len(self._blocks.modules) - 1
        given = embedding(self._batches[0][:1, :1])
        shape, like = given.shape[2:], given.new_zeros(())
        try:
            before = [self._record(block, 0)[0] for block in (0, last)]
            self._without = {embedding: lambda ids: like.expand(*ids.shape, *shape).clone()}
            behind = [self._record(block, 0)[0] for block in (0, last)]
            same = all(one.same_as(other) for one, other in zip(before, behind, strict=True))
        except SourceError:
            same = False
        if not same:
            self._without = {}
        return same

    def split(self, size: int) -> None:
        """Make batches of at most so many windows out of the larger ones."""
        self._beside.split(size, map(len, self._batches))
        self._batches = [part for batch in self._batches for part in torch.split(batch, size)]

    def calls(self, block: int) -> Callable[[int], Call]:
        """The arguments of a block's call, by the batch's index.

        Those that are the same for several batches are learnt once and kept.
        """
        known: dict[int, Call] = {}

        def call(batch: int) -> Call:
            if batch not in known:
                found = self._record(block, batch)[0]
                if self.hands_on:
                    return found
                same = next((one for one in known.values() if one.same_as(found)), None)
                if known and same is None:
                    return found
                known[batch] = found if same is None else same
            return known[batch]

        return call

    def trial(self, block: int, hidden: Tensor) -> tuple[Call, Tensor]:
        """A call of a block for the first window of the first batch alone, and its hidden states.

        They are copied out of the batch's. Where blocks give later ones more than hidden states it
        is the whole batch.
        """
        if self.hands_on:
            return self._record(block, 0)[0], hidden
        window = hidden.narrow(self.dimension(hidden), 0, 1).clone()
        return self._record(block, 0, self._batches[0][:1])[0], window

    def try_block(self, index: int, block: nn.Module) -> None:
        """Run a block of a kind that is new once, so that stubs return what it does.

        With the first one it is seen, before any long work, whether the decoder can be run so.

        Raises:
            SourceError: it cannot be run block by block.
        """
        if type(block) in self.returns:
            return
        call, hidden = self._record(index, 0)
        try:
            output = block(hidden, *call.args, **call.kwargs)
        except (torch.OutOfMemoryError, SourceError):
            raise
        except Exception as error:  # of the model's own lines, which may ask for anything
            raise self._refused(
                f"'{self._blocks.name(index)}' fails by itself ({_said(error)})"
            ) from error
        self.returns[type(block)] = others(output)
        if index == 0:
            self._beside.handed_on = self._hands_outputs_on()
        self._keep(0, output)

    def _hands_outputs_on(self) -> bool:
        """Whether what blocks return beside hidden states reaches other blocks."""
        made = [object() for _ in range(max(count or 0 for count in self.returns.values()))]
        marks = {id(mark) for mark in made}
        self._beside.outputs[0] = tuple(made)
        last = self._record(len(self._blocks.modules) - 1, 0)[0]
        del self._beside.outputs[0]
        return any(id(value) in marks for value in (*last.args, *last.kwargs.values()))

    def _keep(self, batch: int, output: object) -> None:
        if self._beside.handed_on and isinstance(output, (tuple, list)):
            self._beside.outputs[batch] = tuple(output[1:])

    def _record(self, wanted: int, batch: int, ids: Tensor | None = None) -> tuple[Call, Tensor]:
        """How a block is called for a batch, or for other token ids, and what enters the first."""
        found: list[tuple[Call, Tensor]] = []
        passed: list[Tensor] = []
        beside = self._beside.outputs.get(batch, ())

        def stub(index: int) -> Callable[..., object]:
            def forward(*args: Any, **kwargs: Any) -> object:
                if args:
                    hidden, rest = args[0], args[1:]
                else:
                    hidden, rest = kwargs.pop("hidden_states"), ()
                if passed and passed[-1] is not hidden:
                    raise self._refused(
                        f"'{self._blocks.name(index)}' is not fed what the block before it returns"
                    )
                passed.append(hidden)
                kwargs = self._beside.filled(batch, kwargs)
                if index == wanted:
                    keep = partial(self._keep, batch) if self._beside.handed_on else None
                    found.append((Call(rest, kwargs, keep), hidden))
                    raise _Reached
                return as_returned(hidden, modules[index], self.returns, beside)

            return forward

        modules = self._blocks.modules
        stubs = {**{module: stub(index) for index, module in enumerate(modules)}, **self._without}
        for module, forward in stubs.items():
            module.forward = forward
        try:
            windows = self._batches[batch] if ids is None else ids
            self._blocks.decoder(input_ids=windows, use_cache=False)
        except _Reached as reached:
            _forget(reached)
        except (torch.OutOfMemoryError, SourceError):
            raise
        except Exception as error:  # of the model's own lines, which may ask for anything
            raise self._refused(f"it fails between its blocks ({_said(error)})") from error
        finally:
            for module in stubs:
                del module.forward
        if not found:
            raise self._refused(f"'{self._blocks.name(wanted)}' is not called")
        return found[0]

    def _refused(self, reason: str) -> SourceError:
        return SourceError(
            type(self._blocks.decoder).__name__,
            f"a decoder that cannot be run block by block: {reason}",
            needed="a decoder that hands hidden states from block to block",
            do="Such a model cannot be calibrated yet; --recipe fast does without.",
        )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


@contextmanager
def inputs_of(modules: dict[str, nn.Module], seen: dict[str, Tensor]) -> Iterator[None]:
    """While this context is open, the inputs of the modules are put into `seen` by name.

    Of modules that are called more than once those of the first call, before which others stop.
    """

    def record(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault(name, args[0])

    with _hooked(
        module.register_forward_pre_hook(partial(record, name)) for name, module in modules.items()
    ):
        yield


@contextmanager
def outputs_of(modules: dict[str, nn.Module], made: dict[str, Tensor]) -> Iterator[None]:
    """While this context is open, copies of the modules' outputs are put into `made` by name.

    Of the first call, too. Copies, as a model may add its hidden states to an output where that
    lies.
    """

    def record(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if name not in made:
            made[name] = output.clone()

    with _hooked(
        module.register_forward_hook(partial(record, name)) for name, module in modules.items()
    ):
        yield


@contextmanager
def _hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes hooks in the end."""
    handles = list(hooks)
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
    except _Reached as reached:
        _forget(reached)
    finally:
        handle.remove()


def _forget(reached: _Reached) -> None:
    """Let go of what the calls that were left have computed, before cycles are looked for."""
    traceback.clear_frames(reached.__traceback__)
    reached.__traceback__ = None


def batches_of(windows: Tensor, tokens_at_once: int, device: torch.device) -> list[Tensor]:
    """Windows `[samples, seq_len]` in batches of at most so many tokens, at least one window."""
    size = max(1, tokens_at_once // windows.shape[1])
    return [windows[at : at + size].to(device) for at in range(0, len(windows), size)]
