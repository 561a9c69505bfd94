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
ONE = 32767  # what stands for 1 in int16


@dataclass(frozen=True)
class Learnt:
    """What learns.

    Attributes:
        parameter: takes the gradient.
        rate: of learning.
        value: what is moved, int16 of the same shape, `ONE` for 1, held within [-1, 1]; the
            parameter itself if there is none, which is float32 then.
    """

    parameter: nn.Parameter
    rate: float
    value: Tensor | None = None


class Adam:
    """Moves parameters whenever a backward pass reaches them."""

    def __init__(self, learnt: Iterable[Learnt]) -> None:
        self._step, self._share, self._handles = 0, 1.0, []
        for one in learnt:
            shape, dtype = one.parameter.shape, one.parameter.dtype
            mean, square = (
                torch.zeros(shape, dtype=dtype, device=one.parameter.device) for _ in range(2)
            )
            state = _State(one, mean, square)
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
        learnt, gradient = state.learnt, state.learnt.parameter.grad
        assert gradient is not None
        low, high = (1 - beta**self._step for beta in BETAS)
        step = learnt.rate * self._share / low
        value = learnt.parameter if learnt.value is None else learnt.value
        changed = (value.view(-1), state.mean.view(-1), state.square.view(-1))
        flat = (gradient.reshape(-1), *changed)
        for start in range(0, value.numel(), ELEMENTS_AT_ONCE):
            g, now, mean, square = (t[start : start + ELEMENTS_AT_ONCE] for t in flat)
            g = g.float()
            m = mean.float().lerp_(g, 1 - BETAS[0])
            v = square.float().mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            mean.copy_(m)
            square.copy_(v)
            size = (v / high).sqrt_().add_(EPSILON)
            if learnt.value is None:
                now.addcdiv_(m, size, value=-step)
            else:
                moved = now.float().addcdiv_(m, size, value=-step * ONE)
                now.copy_(moved.round_().clamp_(-ONE, ONE))
        learnt.parameter.grad = None


@dataclass(frozen=True)
class _State:
    learnt: Learnt
    mean: Tensor
    square: Tensor
