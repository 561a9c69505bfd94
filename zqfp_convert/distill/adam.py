"""Adam (Kingma and Ba, arXiv:1412.6980) that takes each gradient as soon as it is there.

A parameter is moved, and its gradient dropped, within the backward pass, so that the gradients of a
model never exist together; it must therefore get its whole gradient in one backward pass a step.
Moments have the dtype of their parameter. What is computed is float32, a slice at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
EPSILON = 1e-16  # a model of billions of weights has gradients far below the usual 1e-8
ELEMENTS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Learnt:
    """A parameter, float32 or bfloat16, with its learning rate and, if any, its largest size."""

    parameter: nn.Parameter
    rate: float
    bound: float | None = None


class Adam:
    """Moves parameters whenever a backward pass reaches them."""

    def __init__(self, learnt: Iterable[Learnt], seed: int = 0) -> None:
        """`seed` is of the rounding of bfloat16 parameters, which is stochastic."""
        self._seed, self._random = seed, dict[torch.device, torch.Generator]()
        self._step, self._share, self._handles = 0, 1.0, []
        for one in learnt:
            state = _State(one, torch.zeros_like(one.parameter), torch.zeros_like(one.parameter))
            one.parameter.requires_grad_(True)
            hook = one.parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda parameter, state=state: self._move(state)
            )
            self._handles.append(hook)

    def begin(self, share: float) -> None:
        """Begin a step, in which learning rates are `share` of what they are."""
        self._step, self._share = self._step + 1, share

    def end(self) -> None:
        """Move nothing any more."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _move(self, state: _State) -> None:
        parameter, gradient = state.learnt.parameter, state.learnt.parameter.grad
        assert gradient is not None
        low, high = (1 - beta**self._step for beta in BETAS)
        changed = (parameter.view(-1), state.mean.view(-1), state.square.view(-1))
        flat = (gradient.reshape(-1), *changed)
        for start in range(0, parameter.numel(), ELEMENTS_AT_ONCE):
            g, value, mean, square = (t[start : start + ELEMENTS_AT_ONCE] for t in flat)
            g = g.float()
            m = mean.float().lerp_(g, 1 - BETAS[0])
            v = square.float().mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            mean.copy_(m)
            square.copy_(v)
            size = (v / high).sqrt_().add_(EPSILON)
            moved = value.float().addcdiv_(m, size, value=-state.learnt.rate * self._share / low)
            if state.learnt.bound is not None:
                moved.clamp_(-state.learnt.bound, state.learnt.bound)
            value.copy_(moved if value.dtype == torch.float32 else self._rounded(moved))
        parameter.grad = None

    def _rounded(self, values: Tensor) -> Tensor:
        """One of the two bfloat16 numbers next to each, the nearer one more often.

        In the mean nothing is lost, however small a step is beside the distance of two numbers.
        """
        if values.device not in self._random:
            generator = torch.Generator(values.device)
            self._random[values.device] = generator.manual_seed(self._seed)
        extra = torch.randint(
            1 << 16,
            values.shape,
            dtype=torch.int32,
            device=values.device,
            generator=self._random[values.device],
        )
        cut = (values.view(torch.int32) + extra) & -(1 << 16)
        return cut.view(torch.float32).bfloat16()


@dataclass(frozen=True)
class _State:
    learnt: Learnt
    mean: Tensor
    square: Tensor
