"""A source some of whose tensors the model has merged or split, as if they lay so on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zqfp_convert.checkpoint.shards import DTYPES, Shards, TensorInfo


@dataclass(frozen=True)
class Merge:
    """A tensor that is made of others.

    Attributes:
        sources: the names of the others.
        make: makes it of them, given in that order; on the meta device too.
    """

    sources: tuple[str, ...]
    make: Callable[[list[Tensor]], Tensor]


class MergedShards(Shards):
    """The tensors of a folder, some of them replaced by what is made of them."""

    def __init__(self, base: Shards, merges: Mapping[str, Merge]) -> None:
        """`merges` are what is made by name; their sources are tensors no more."""
        used = {source for merge in merges.values() for source in merge.sources}
        tensors = {name: info for name, info in base.tensors.items() if name not in used}
        for name, merge in merges.items():
            infos = [base.tensors[source] for source in merge.sources]
            made = merge.make([torch.empty(i.shape, dtype=DTYPES[i.dtype], device="meta")
                               for i in infos])  # fmt: skip
            tensors[name] = TensorInfo(
                infos[0].file, infos[0].dtype, tuple(made.shape), made.numel() * made.itemsize
            )
        super().__init__(base.folder, tensors)
        self._base, self._merges = base, merges

    @property
    def stored_bytes(self) -> int:
        """As in `Shards`."""
        return self._base.stored_bytes

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """As in `Shards`."""
        names = list(names)
        found = self._base.read([name for name in names if name not in self._merges], device)
        for name in names:
            if name in self._merges:
                merge = self._merges[name]
                parts = self._base.read(merge.sources, device)
                made = merge.make([parts[source] for source in merge.sources])
                found[name] = made.contiguous()
        return {name: found[name] for name in names}

    def read_at(self, name: str, index: int) -> Tensor:
        """As in `Shards`."""
        if name in self._merges:
            return self.read([name])[name][index]
        return self._base.read_at(name, index)
