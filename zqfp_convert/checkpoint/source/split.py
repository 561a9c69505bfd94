"""A source whose experts lie in one tensor, as if each of their matrices had a tensor of its own.

Only the part of the one expert that is asked for is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zqfp_convert.checkpoint.shards import Shards, TensorInfo


@dataclass(frozen=True)
class Slice:
    """A tensor that is part of another one.

    Attributes:
        whole: the name of the other.
        expert: its index there, along the first dimension.
        shape: of the part.
        take: makes the part of what lies at that index.
    """

    whole: str
    expert: int
    shape: tuple[int, ...]
    take: Callable[[Tensor], Tensor]


class SplitShards(Shards):
    """The tensors of a folder, some of them replaced by their parts."""

    def __init__(self, base: Shards, slices: Mapping[str, Slice]) -> None:
        """`slices` are the parts by their names; together they are all of their wholes."""
        parts: dict[str, list[str]] = {}
        for name, one in slices.items():
            parts.setdefault(one.whole, []).append(name)
        tensors: dict[str, TensorInfo] = {}
        for name, info in base.tensors.items():
            for part in parts.get(name, []):
                share = info.bytes // len(parts[name])
                tensors[part] = TensorInfo(info.file, info.dtype, slices[part].shape, share)
            if name not in parts:
                tensors[name] = info
        super().__init__(base.folder, tensors)
        self._base, self._slices = base, slices

    @property
    def stored_bytes(self) -> int:
        """As in `Shards`."""
        return self._base.stored_bytes

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """As in `Shards`."""
        names = list(names)
        whole = self._base.read([name for name in names if name not in self._slices], device)
        return {name: whole[name] if name in whole else self._part(name, device) for name in names}

    def _part(self, name: str, device: torch.device | str) -> Tensor:
        part = self._slices[name]
        return part.take(self._base.read_at(part.whole, part.expert).to(device)).contiguous()
