"""A source whose residual stream is rotated: the same function from other weights.

With Q the rotation of `numerics/hadamard.py` and `n` a norm without gain and bias: a linear with
the weight W that reads `gain * n(h) + bias` gives the same for `n(Q h) + Q (bias / gain)` with
`W diag(gain) Q`, and one that adds to h adds to `Q h` with `Q W` (QuaRot, arXiv:2404.00456, section
3; SliceGPT, arXiv:2401.15024, section 3.1). Q leaves the mean alone, so `n` may be a LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from zqfp_convert.checkpoint.shards import Shards
from zqfp_convert.numerics import hadamard

SLICE = 4096  # rows or columns rotated at a time


@dataclass(frozen=True)
class Rotation:
    """Which tensors of a model, by their names on disk, a rotated residual stream changes.

    Attributes:
        readers: weights of linears that read it, and the weight of the norm in between.
        writers: weights of linears that write to it.
        biases: of writers.
        norms: weights of norms that readers read through, and their biases, or None.
        embeddings: whose rows enter it.
        head: the reader that is the output head.
        tied_to: the embedding that the source has in the head's place, or None; they are two
            tensors from here on.
        transposed: those of `readers` and `writers` that are stored `[K, N]`.
    """

    readers: dict[str, str]
    writers: set[str]
    biases: set[str]
    norms: dict[str, str | None]
    embeddings: set[str]
    head: str
    tied_to: str | None = None
    transposed: set[str] = field(default_factory=set)

    @property
    def changed(self) -> set[str]:
        """All tensors that it changes."""
        biases = {bias for bias in self.norms.values() if bias is not None}
        linears = self.readers.keys() | self.writers | self.biases
        return linears | self.norms.keys() | biases | self.embeddings

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        fields = asdict(self)
        return {key: sorted(v) if isinstance(v, set) else v for key, v in fields.items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Rotation:
        """What `to_json` has spelled."""
        fields: dict[str, Any] = {k: set(v) if isinstance(v, list) else v for k, v in value.items()}
        return cls(**fields)


def rotate_weight(weight: Tensor, gain: Tensor | None) -> Tensor:
    """The weight `[N, K]` of a reader behind a norm of that gain `[K]`, of a writer without."""
    if gain is None:
        starts = range(0, weight.shape[1], SLICE)
        return torch.cat([hadamard.rotate(weight[:, at : at + SLICE], 0) for at in starts], 1)
    return _rows(weight, gain, torch.float64 if weight.dtype == torch.float64 else torch.float32)


def _rows(table: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows `[N, K]` times a gain `[K]`, rotated; some at a time, to bound the memory."""
    result = torch.empty(table.shape, dtype=dtype, device=table.device)
    for start in range(0, len(table), SLICE):
        part = table[start : start + SLICE]
        part = part if part.dtype == torch.float64 else part.float()
        part = part if gain is None else part * gain.to(part.dtype)
        result[start : start + SLICE] = hadamard.rotate(part, 1).to(dtype)
    return result


class RotatedShards(Shards):
    """The tensors of a folder as they are with a rotated residual stream.

    Linears of the blocks, and biases, come in float32, so that nothing is rounded before it is
    quantized; the others in the dtype that they are stored in.
    """

    def __init__(self, base: Shards, rotation: Rotation) -> None:
        tensors = {name: replace(info, start=None) for name, info in base.tensors.items()}
        if rotation.tied_to is not None:
            tensors[rotation.head] = tensors[rotation.tied_to]
        super().__init__(base.folder, tensors)
        self._base, self._rotation = base, rotation
        self._norm_of = {bias: norm for norm, bias in rotation.norms.items() if bias is not None}

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """As in `Shards`."""
        return self.turn(names, {}, device)

    def turn(
        self, names: Iterable[str], stored: Mapping[str, Tensor], device: torch.device | str
    ) -> dict[str, Tensor]:
        """As `read`, from tensors of the folder on that device; what lacks there is read."""
        held = dict(stored)

        def get(name: str) -> Tensor:
            if name not in held:
                held.update(self._base.read([name], device))
            return held[name]

        return {name: self._turned(name, get) for name in names}

    def _turned(self, name: str, get: Callable[[str], Tensor]) -> Tensor:
        found = self._rotation
        tied = found.tied_to if name == found.head else None
        stored = get(name if tied is None else tied)
        if name in found.norms:
            return torch.ones_like(stored)
        if name in self._norm_of:
            moved = hadamard.rotate(stored.float() / get(self._norm_of[name]).float())
            return moved.to(stored.dtype)
        if name in found.biases:
            return hadamard.rotate(stored)
        if name in found.readers or name in found.writers:
            gain = get(found.readers[name]) if name in found.readers else None
            if name == found.head:
                return _rows(stored, gain, stored.dtype)
            weight = stored.t() if name in found.transposed else stored
            weight = rotate_weight(weight, gain)
            return weight.t() if name in found.transposed else weight
        if name in found.embeddings:
            return _rows(stored, None, stored.dtype)
        return stored
