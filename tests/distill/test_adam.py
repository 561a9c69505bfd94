"""The optimizer against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zqfp_convert.distill import adam
from zqfp_convert.distill.adam import BETAS, EPSILON, ONE, Adam, Learnt


def losses(parameters: list[nn.Parameter], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    noise = [torch.randn(p.shape, generator=generator) for p in parameters]
    return sum((p.float() - n).square().sum() for p, n in zip(parameters, noise, strict=True))  # type: ignore[return-value]


def test_in_float32_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam, "ELEMENTS_AT_ONCE", 8)
    start = [torch.randn(5, 7), torch.randn(3)]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    rates, shares = (0.03, 0.2), (0.5, 1.0, 0.7, 0.1)
    mine = Adam(Learnt(p, rate) for p, rate in zip(ours, rates, strict=True))
    groups = [{"params": [p], "lr": rate} for p, rate in zip(theirs, rates, strict=True)]
    judge = torch.optim.Adam(groups, betas=BETAS, eps=EPSILON)
    for step, share in enumerate(shares):
        mine.begin(share)
        losses(ours, step).backward()
        assert all(p.grad is None for p in ours)  # moved, and dropped
        for group, rate in zip(judge.param_groups, rates, strict=True):
            group["lr"] = rate * share
        judge.zero_grad()
        losses(theirs, step).backward()
        judge.step()
    for have, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(have, want)
    mine.end()
    losses(ours, 0).backward()
    assert ours[0].grad is not None


def handle(size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros((), dtype=torch.bfloat16).expand(size))


class _Linear(torch.autograd.Function):
    """A loss with given gradients for a parameter that holds nothing."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.bfloat16(), None


def test_int16_stays_with_torch() -> None:
    """Rates and steps as in tuning, noisy gradients far below torch's usual epsilon."""
    parameter, value, steps, rate = handle(4096), torch.zeros(4096, dtype=torch.int16), 160, 0.0133
    theirs = nn.Parameter(torch.zeros(4096))
    mine = Adam([Learnt(parameter, rate, value)])
    judge = torch.optim.Adam([theirs], rate, betas=BETAS, eps=EPSILON)
    slope = torch.randn(4096) * 0.1
    for step in range(steps):
        share = 1 - step / steps
        gradient = (slope + torch.randn(4096)) * 1e-10
        mine.begin(share)
        _Linear.apply(parameter, gradient).backward()
        assert parameter.grad is None
        judge.param_groups[0]["lr"] = rate * share
        theirs.grad = gradient
        judge.step()
        with torch.no_grad():
            theirs.clamp_(-1, 1)
    want = theirs.detach()
    assert float(want.abs().max()) > 0.5
    off = value.float() / ONE - want
    assert float(off.norm() / want.norm()) < 0.01  # of bfloat16 moments
    assert abs(float(off.mean())) < 1e-4


def test_bounds_hold_exactly() -> None:
    parameter, value = handle(1000), torch.zeros(1000, dtype=torch.int16)
    mine = Adam([Learnt(parameter, 0.3, value)])
    for _ in range(5):
        mine.begin(1.0)
        _Linear.apply(parameter, torch.ones(1000)).backward()
    assert torch.equal(value, torch.full_like(value, -ONE))


def test_what_has_no_gradient_stays() -> None:
    parameter, value = handle(100), torch.randint(-100, 100, (100,), dtype=torch.int16)
    start = value.clone()
    mine = Adam([Learnt(parameter, 0.3, value)])
    mine.begin(1.0)
    _Linear.apply(parameter, (torch.arange(100) < 50).float()).backward()
    assert torch.equal(value[50:], start[50:])
    assert (value[:50] != start[:50]).all()
