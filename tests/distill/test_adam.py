"""The optimizer against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zqfp_convert.distill import adam
from zqfp_convert.distill.adam import BETAS, EPSILON, Adam, Learnt


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


def test_bfloat16_loses_nothing_in_the_mean() -> None:
    """Steps of an eighth of what bfloat16 can tell apart: rounding to nearest would lose them."""
    ours, theirs = (
        nn.Parameter(torch.full((4096,), 0.75, dtype=d)) for d in (torch.bfloat16, torch.float32)
    )
    step = 2.0**-8 / 8
    mine, judge = Adam([Learnt(ours, step)], seed=3), torch.optim.Adam([theirs], step, betas=BETAS)
    for number in range(40):
        mine.begin(1.0)
        pull = 1 + 0.1 * (number % 3)
        (ours.float() * pull).sum().backward()
        judge.zero_grad()
        (theirs * pull).sum().backward()
        judge.step()
    moved = 0.75 - theirs.detach()
    assert float(moved.mean()) == pytest.approx(40 * step, rel=0.05)
    assert float((0.75 - ours.detach().float()).mean()) == pytest.approx(
        float(moved.mean()), rel=0.03
    )
    distance = float((ours.detach().float() - theirs.detach()).abs().max())
    assert distance < 12 * 2.0**-8


def test_bounds_hold_exactly() -> None:
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    mine = Adam([Learnt(parameter, 0.3, bound=1.0)])
    for _ in range(5):
        mine.begin(1.0)
        parameter.float().sum().backward()
    assert torch.equal(parameter.detach(), torch.full_like(parameter, -1.0))


def test_what_has_no_gradient_stays() -> None:
    parameter = nn.Parameter(torch.randn(100).bfloat16())
    start = parameter.detach().clone()
    mine = Adam([Learnt(parameter, 0.3)])
    mine.begin(1.0)
    (parameter.float() * (torch.arange(100) < 50)).sum().backward()
    assert torch.equal(parameter.detach()[50:], start[50:])
    assert (parameter.detach()[:50] != start[:50]).all()


def test_the_same_seed_gives_the_same() -> None:
    made = []
    for seed in (1, 1, 2):
        parameter = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        mine = Adam([Learnt(parameter, 1e-3)], seed)
        mine.begin(1.0)
        parameter.float().sum().backward()
        made.append(parameter.detach().clone())
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
