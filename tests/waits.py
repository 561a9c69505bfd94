"""Counts what makes a program wait for a GPU, on any machine: numbers asked of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode

# What fetches numbers from where a tensor lies; `tensor` takes some there, and waits for that.
WAITING = {"__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy", "cpu"}
WAITING |= {"equal", "nonzero", "tensor"}


class Waits(TorchFunctionMode):
    """While this context is open, the calls that wait for the device of a tensor are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITING:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))
