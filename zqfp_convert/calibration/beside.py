"""What blocks hand on to later ones beside hidden states: other outputs, or a container they fill.

Some models choose positions to look at in one block and look at them in the next, or let later
blocks take keys and values of earlier ones. What the last run of a block handed on stays here,
batch by batch.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, MutableSequence
from typing import Any

import torch


class Beside:
    """What was handed on, by the index of the batch.

    Attributes:
        outputs: all that the block that ran last returned beside hidden states; empty, and not to
            be kept, unless `handed_on`.
        containers: by argument.
        handed_on: whether such outputs reach other blocks.
    """

    def __init__(self) -> None:
        self.outputs: dict[int, tuple[Any, ...]] = {}
        self.containers: dict[int, dict[str, Any]] = {}
        self.handed_on = False

    @property
    def anything(self) -> bool:
        """Whether calls of a block differ between batches in what earlier blocks have made."""
        return self.handed_on or any(self.containers.values())

    def filled(self, batch: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments with empty containers replaced by those that earlier blocks have filled."""
        kept = self.containers.setdefault(batch, {})
        return {
            name: kept.setdefault(name, value) if is_empty_container(value) else value
            for name, value in kwargs.items()
        }

    def split(self, size: int, lengths: Iterable[int]) -> None:
        """Make batches of at most so many windows out of those of these lengths."""
        outputs, containers = self.outputs, self.containers
        self.outputs, self.containers = {}, {}
        made = 0
        for batch, length in enumerate(lengths):
            for start in range(0, length, size):
                chosen = slice(start, start + size)
                if batch in outputs:
                    self.outputs[made] = _part(outputs[batch], length, chosen)
                if batch in containers:
                    one = containers[batch].items()
                    self.containers[made] = {n: _part(v, length, chosen) for n, v in one}
                made += 1


def is_empty_container(value: object) -> bool:
    """Whether a value is a dict or a list to be filled."""
    return isinstance(value, (MutableMapping, MutableSequence)) and len(value) == 0


def _part(value: Any, length: int, chosen: slice) -> Any:
    """Some windows of what was handed on for a batch of `length` windows."""
    if isinstance(value, torch.Tensor):
        return value[chosen] if value.ndim > 0 and value.shape[0] == length else value
    if isinstance(value, MutableMapping):
        made = type(value)()
        made.update({key: _part(one, length, chosen) for key, one in value.items()})
        return made
    if isinstance(value, (tuple, list)):
        return type(value)(_part(one, length, chosen) for one in value)
    return value
