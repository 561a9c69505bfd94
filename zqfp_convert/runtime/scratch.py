"""The buffer for the expanded matrix of one layer at a time, shared by all layers of a model.

Operators are told its key and look it up here. Were it an argument that they write, torch.compile
would see every layer change the same tensor, and copy it to keep them apart.
"""

from __future__ import annotations

from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_keys = count()
_living: WeakValueDictionary[int, Scratch] = WeakValueDictionary()


class Scratch:
    """One buffer for each device, as large as the largest matrix asked for.

    Work on one stream at a time: two streams that expand at once would write over one another's
    matrix.

    Layers ask as they arrive on a device, so that no call has to make room, which a CUDA graph that
    was captured before would not notice.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Tensor] = {}
        self.key = next(_keys)
        _living[self.key] = self

    def matrix(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """An uninitialised uint8 `[rows, columns]` on the device; earlier ones lose their data."""
        buffer = self._buffers.get(device)
        if buffer is None or buffer.numel() < rows * columns:
            self._buffers.pop(device, None)  # freed first: the new one may take its place
            del buffer
            with torch.inference_mode(False):  # else nobody could write it outside of that mode
                buffer = torch.empty(rows * columns, dtype=torch.uint8, device=device)
            self._buffers[device] = buffer
        return buffer[: rows * columns].view(rows, columns)

    def __reduce__(self) -> tuple[type[Scratch], tuple[()]]:
        """A copy of a model gets a buffer of its own."""
        return Scratch, ()


def scratch(key: int) -> Scratch:
    """The scratch with that key."""
    return _living[key]
