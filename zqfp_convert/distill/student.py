"""A quantized model that can be tuned: its norms, its hidden states, its logits and the original's.

Of its activations only what enters each block is kept; a block runs again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from zqfp_convert.distill.tunable import straight, tunables
from zqfp_convert.model.blocks import Blocks, first_tensor, others
from zqfp_convert.model.head import Head


class Student:
    """A model with tunable linears.

    Outside of its blocks the original differs from it in nothing but the norms, so that the model
    is the original's head too, with the norms that it starts with.

    Attributes:
        norms: float32 weights and biases of norms by name, which the model sees rounded.
    """

    def __init__(self, model: PreTrainedModel, blocks: Blocks, stored: torch.dtype) -> None:
        """`stored` is the dtype of norms in the file. Nothing learns yet."""
        self.model, self._blocks, self._stored = model.requires_grad_(False), blocks, stored
        self._returns: dict[type[nn.Module], int | None] = {}
        given = [
            (path, module, leaf)
            for path, module in model.named_modules()
            if "Norm" in type(module).__name__
            for leaf, value in module.named_parameters(recurse=False)
            if value.ndim == 1
        ]
        self.norms: dict[str, nn.Parameter] = {}
        self._start: dict[str, Tensor] = {}  # by their names as parametrized
        for path, module, leaf in given:
            vector = nn.Parameter(getattr(module, leaf).detach().float().clone())
            dtype = getattr(module, leaf).dtype
            setattr(module, leaf, vector)
            register_parametrization(module, leaf, _Stored(stored, dtype), unsafe=True)
            self.norms[f"{path}.{leaf}"] = module.parametrizations[leaf].original
            start = vector.detach().clone()
            self._start[f"{path}.parametrizations.{leaf}.original"] = start
        model.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def hidden(self, ids: Tensor) -> Tensor:
        """Hidden states `[batch, T, width]` behind the last block; `ids` int64 `[batch, T]`."""
        found: list[Tensor] = []

        def checkpointed(module: nn.Module) -> Callable[..., object]:
            forward: Callable[..., object] = module.forward

            def run(*args: Any, **kwargs: Any) -> object:
                output = checkpoint(
                    forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
                )
                self._returns[type(module)] = others(output)
                found[:] = [first_tensor(output)]
                return output

            return run

        for module in self._blocks.modules:
            module.forward = checkpointed(module)
        try:
            self._blocks.decoder(input_ids=ids, use_cache=False)
        finally:
            for module in self._blocks.modules:
                del module.forward
        return found[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Of hidden states `[tokens, width]` behind the last block, once any have been made."""
        return Head(self.model, self._blocks, returns=self._returns).logits(hidden)

    @torch.no_grad()
    def original_logits(self, hidden: Tensor) -> Tensor:
        """The same as the original computes them."""

        def original(**given: Any) -> Any:
            return functional_call(self.model, self._start, (), given)

        return Head(original, self._blocks, returns=self._returns).logits(hidden)

    def stored_norms(self) -> dict[str, Tensor]:
        """The norms as the file will have them, by name."""
        return {name: value.detach().to(self._stored) for name, value in self.norms.items()}

    @torch.no_grad()
    def reset(self) -> None:
        """Put everything back to where it started."""
        for vector, start in zip(self.norms.values(), self._start.values(), strict=True):
            vector.copy_(start)
        for linear in tunables(self.model):
            linear.reset()


class _Stored(nn.Module):
    """A value as it will be when it comes from the file; rounding counts as the identity."""

    def __init__(self, stored: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__()
        self._stored, self._dtype = stored, dtype

    def forward(self, value: Tensor) -> Tensor:
        return straight(value, value.detach().to(self._stored).float()).to(self._dtype)
