"""Several processes that do one piece of work, each with a GPU: torchrun starts them.

A `World` is all of them; without torchrun it is this process alone, and its methods give back what
they get. It knows nothing of models. Tensors meet on their own device (NCCL, on the CPU Gloo),
other values through Gloo.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from zqfp_convert.errors import OptionError
from zqfp_convert.parallel.lacking import lacking
from zqfp_convert.parallel.watch import Watch

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # for one another; `Watch` sees who is gone long before
FEWEST_ROWS = 8  # of a share; fewer are not worth handing out


class OutOfMemory(torch.OutOfMemoryError):
    """Memory has ended on one of the processes, and all of them know."""


@dataclass(frozen=True)
class World:
    """The processes of a piece of work.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are.
        local_rank, local_size: among those of this host.
        device: what this one computes on, or None where nothing is said.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: str | None = None
    _gpus: Any = field(default=None, repr=False, compare=False)
    _watch: Watch | None = field(default=None, repr=False, compare=False)

    @property
    def leads(self) -> bool:
        """Whether this is the process that decides, shows and keeps the journal."""
        return self.rank == 0

    def share(self, total: int) -> Share:
        """The rows of this process, of so many that all have; few rows are everybody's."""
        return Share(self if total >= FEWEST_ROWS * self.size else ALONE, total)

    def part(self, total: int, rank: int | None = None) -> slice:
        """A process's contiguous part, by default this one's, of so many things."""
        rank = self.rank if rank is None else rank
        each, more = divmod(total, self.size)
        start = rank * each + min(rank, more)
        return slice(start, start + each + (rank < more))

    # Tensors.

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place; the same bits everywhere."""
        if self.size > 1:
            whole = tensor if tensor.is_contiguous() else tensor.contiguous()
            with self._meeting():
                dist.all_reduce(whole, group=self._group(whole))
            if whole is not tensor:
                tensor.copy_(whole)
        return tensor

    def send_(self, tensor: Tensor, source: int) -> Tensor:
        """Give everybody a contiguous tensor that one process has, in place."""
        if self.size > 1 and tensor.numel():
            bytes_of = tensor.view(-1).view(torch.uint8)  # NCCL does not know every dtype
            with self._meeting():
                dist.broadcast(bytes_of, source, group=self._group(tensor))
        return tensor

    def merge(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The tensors of all processes, by names of which none is two processes'."""
        if self.size == 1:
            return dict(tensors)
        own = [(name, tuple(one.shape), one.dtype) for name, one in tensors.items()]
        found: dict[str, Tensor] = {}
        for source, kinds in enumerate(self.gather(own)):
            for name, shape, dtype in kinds:
                if source == self.rank:
                    one = tensors[name].to(device).contiguous()
                else:
                    one = torch.empty(shape, dtype=dtype, device=device)
                found[name] = self.send_(one, source)
        return found

    # Numbers and other values.

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        return (
            float(self.sum_(torch.tensor(value, dtype=torch.float64))) if self.size > 1 else value
        )

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._meeting():
            dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: T, source: int = 0) -> T:
        """The value that one process has."""
        if self.size == 1:
            return value
        held: list[Any] = [value if source == self.rank else None]
        with self._meeting():
            dist.broadcast_object_list(held, source)
        found: T = held[0]
        return found

    def lead(self, find: Callable[[], T]) -> T:
        """What the leading process finds; the others wait for it."""
        return self.broadcast(find() if self.leads else None)  # type: ignore[return-value]

    def agree(self, find: Callable[[], T]) -> T:
        """What all find, as the leading process has it; an `attempt`."""
        return self._found(find)[0]

    def every(self, holds: Callable[[], bool]) -> bool:
        """Whether all find that something holds; an `attempt`."""
        return all(self._found(holds))

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Work that needs no other process: where memory ends on one, it ends on all.

        Without it the others would wait for that one in vain.

        Raises:
            OutOfMemory: on every process.
        """
        if self.size == 1:
            yield
            return
        short = ""
        try:
            with lacking():
                yield
        except torch.OutOfMemoryError as error:
            short = str(error) or "out of memory"
        # Out of the handler, which keeps alive what the failed try has computed.
        self._refuse_lacking(self.gather(short))

    def _found(self, find: Callable[[], T]) -> list[T]:
        if self.size == 1:
            return [find()]
        short, value = "", None
        try:
            with lacking():
                value = find()
        except torch.OutOfMemoryError as error:
            short = str(error) or "out of memory"
        found = self.gather((short, value))
        self._refuse_lacking([one for one, _ in found])
        return [one for _, one in found]  # type: ignore[misc]

    def _refuse_lacking(self, short: list[str]) -> None:
        for rank, text in enumerate(short):
            if text:
                raise OutOfMemory(f"process {rank} of {self.size}: {text}")

    def _group(self, tensor: Tensor) -> Any:
        return self._gpus if tensor.is_cuda else None

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            assert self._watch is not None
            raise self._watch.lost(str(error)) from error


ALONE = World()


@dataclass(frozen=True)
class Share:
    """The rows of a matrix that a process works on; a World's, so that they can meet."""

    world: World
    total: int

    @property
    def here(self) -> slice:
        """Which rows."""
        return self.world.part(self.total)

    def gather(self, rows: Tensor) -> Tensor:
        """The matrix `[total, ...]` of which each process has its rows."""
        if self.world.size == 1:
            return rows
        whole = torch.empty((self.total, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        whole[self.here] = rows
        return self.complete_(whole)

    def complete_(self, whole: Tensor) -> Tensor:
        """The same in place: a contiguous matrix of which each process has filled in its rows."""
        for rank in range(self.world.size if self.world.size > 1 else 0):
            self.world.send_(whole[self.world.part(self.total, rank)], rank)
        return whole


@contextmanager
def join(device: str | None = None) -> Iterator[World]:
    """The processes that torchrun has started together; this one alone without it.

    A process that leaves with an error takes the others with it: they end within seconds, and say
    which one it was.

    Args:
        device: that a user wants: `cpu`, or `cuda` for a GPU each; by default GPUs if there are.

    Raises:
        OptionError: there is no GPU for each process.
        ProcessError: another process has failed.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=device)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    host_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    dist.init_process_group("gloo", timeout=PATIENCE)
    with Watch(rank, size, local) as watch:
        device = _own_device(device, local, host_size)
        gpus = None
        if device != "cpu":
            torch.cuda.set_device(device)
            gpus = dist.new_group(backend="nccl", timeout=PATIENCE)
        world = World(rank, size, local, host_size, device, gpus, watch)
        yield world
        world.gather(None)  # nobody leaves before all are done
    dist.destroy_process_group()


def _own_device(wanted: str | None, local_rank: int, local_size: int) -> str:
    """The device of one of the processes of a host."""
    if wanted not in (None, "cpu", "cuda"):
        raise OptionError(
            "device",
            f"{wanted} for each of {local_size} processes",
            needed="cuda (each process has a GPU of its own), or cpu",
            do="Choose GPUs by CUDA_VISIBLE_DEVICES.",
        )
    if wanted == "cpu" or (wanted is None and not torch.cuda.is_available()):
        return "cpu"
    count = torch.cuda.device_count()
    if count < local_size:
        raise OptionError(
            "--nproc-per-node",
            f"{local_size} processes on a host with {count} GPUs",
            needed="a GPU for each process",
            do=f"Start torchrun with --nproc-per-node {count or 1}, or give --device cpu.",
        )
    return f"cuda:{local_rank}"
