"""Linears that get the same input: one product for all, and never an output of another input."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packed_layers import random_layer
from torch import Tensor, nn

from zqfp_convert.runtime import siblings
from zqfp_convert.runtime.kernels.hopper import decode, fused, schedules
from zqfp_convert.runtime.kernels.hopper.multiply import Schedule
from zqfp_convert.runtime.linear import PATH_VARIABLE, QuantizedLinear, Scratch

SIZES = {"q_proj": 64, "k_proj": 24, "v_proj": 40}
COLUMNS = 136


class Attention(nn.Module):
    """Three projections; `inputs` says which of its inputs each gets."""

    def __init__(self, ranks: tuple[int, ...] = (3, 3, 3), seed: int = 0) -> None:
        super().__init__()
        scratch = Scratch()
        for (name, rows), rank in zip(SIZES.items(), ranks, strict=True):
            layer = random_layer("m2", rows, COLUMNS, 64, rank=rank, seed=seed + rows)
            assert layer.row_scale is not None
            layer.row_scale.mul_(2.0**-9)
            self.add_module(name, QuantizedLinear(layer, torch.randn(rows), scratch))

    def forward(self, *x: Tensor) -> Tensor:
        given = dict(zip(SIZES, x * 3 if len(x) == 1 else x, strict=True))
        return torch.cat([self.get_submodule(name)(value) for name, value in given.items()], -1)


@pytest.fixture(autouse=True)
def hopper(kernels: str) -> None:
    if kernels != "hopper":
        pytest.skip("these multiply one by one")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each product had."""
    counts: list[int] = []

    def counting(work: Any) -> Any:
        def counted(inputs: Any, matrices: list[Any], *about: Any) -> None:
            counts.append(len(matrices))
            work(inputs, matrices, *about)

        return counted

    monkeypatch.setattr(fused, "multiply", counting(fused.multiply))
    monkeypatch.setattr(decode, "decode", counting(decode.decode))
    return counts


def pair(*about: Any) -> tuple[Attention, Attention]:
    """The same module alone and linked."""
    torch.manual_seed(0)
    alone = Attention(*about)
    linked = copy.deepcopy(alone)
    siblings.link(nn.ModuleList([linked]))
    return alone, linked


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, COLUMNS).bfloat16()


@pytest.mark.parametrize("shape", [(1,), (2, 3), (600,), (0,), ()])
@pytest.mark.parametrize("rank", [0, 3, 12])
@pytest.mark.parametrize("schedule", [Schedule(8), Schedule(128)], ids=str)
def test_one_product_for_all(
    shape: tuple[int, ...],
    rank: int,
    schedule: Schedule,
    products: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(schedules, "choose", lambda *about: schedule)
    alone, linked = pair((rank, rank, rank))
    x = random(*shape)
    want = alone(x)
    products.clear()
    have = linked(x)
    assert torch.equal(have, want)
    together = rank <= 8  # three times two steps are more than there is room for
    assert products == ([] if 0 in shape else [3] if together else [1, 1, 1])
    assert linked.q_proj._siblings.pending is None
    y = linked.q_proj(x)
    assert y.is_contiguous()


def test_the_expanded_path(products: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH_VARIABLE, "expanded")
    alone, linked = pair()
    x = random(20)
    assert torch.equal(linked(x), alone(x))
    assert products == []


@pytest.mark.parametrize("settings", [{}, {"dynamic": True}], ids=str)
def test_compiled_whole(settings: dict[str, bool], products: list[int]) -> None:
    alone, linked = pair()
    torch._dynamo.reset()
    compiled = torch.compile(linked, fullgraph=True, backend="aot_eager", **settings)
    with torch.no_grad():
        for tokens in (5, 7):
            x = random(tokens)
            want = alone(x)
            products.clear()
            for _ in range(2):
                assert torch.equal(compiled(x), want)
            assert products == [3, 3]


def test_inputs_of_their_own(products: list[int]) -> None:
    alone, linked = pair()
    inputs = [random(4) for _ in range(3)]
    for _ in range(2):
        assert torch.equal(linked(*inputs), alone(*inputs))
    assert linked.q_proj._siblings.apart
    products.clear()
    linked(*inputs)
    assert products == [1, 1, 1]


def test_an_input_that_was_written_to(products: list[int]) -> None:
    alone, linked = pair()
    x = random(4)
    linked.q_proj(x)
    x.mul_(2)
    assert torch.equal(linked.k_proj(x), alone.k_proj(x))


@pytest.mark.parametrize(
    "calls",
    [
        lambda m, a, b: (m.q_proj(a), m.q_proj(b), m.k_proj(b)),
        lambda m, a, b: (m.q_proj(a), m.q_proj(a), m.v_proj(a)),
        lambda m, a, b: (m.v_proj(a), m.k_proj(a), m.v_proj(b), m.k_proj(a), m.q_proj(b)),
    ],
)
def test_any_order(calls: Callable[[Attention, Tensor, Tensor], tuple[Tensor, ...]]) -> None:
    alone, linked = pair()
    a, b = random(4), random(4)
    for have, want in zip(calls(linked, a, b), calls(alone, a, b), strict=True):
        assert torch.equal(have, want)


def test_factors_of_different_kinds(products: list[int]) -> None:
    alone, linked = pair((0, 3, 3))
    x = random(4)
    want = alone(x)
    products.clear()
    assert torch.equal(linked(x), want)
    assert products == [1, 1, 1]


def test_moved_copied_and_loaded(products: list[int]) -> None:
    _, linked = pair()
    torch.manual_seed(1)
    other = Attention(seed=100)
    x = random(4)
    copied = copy.deepcopy(linked)
    copied.load_state_dict(other.state_dict())
    want, before = other(x), linked(x)
    assert not torch.equal(want, before)
    copied.bfloat16()(x)  # in which they find one another
    for _ in range(2):
        products.clear()
        assert torch.equal(copied(x), want)
        assert products == [3]
    assert torch.equal(linked(x), before)


def test_weights_that_change_in_between() -> None:
    _, linked = pair()
    torch.manual_seed(1)
    other = Attention(seed=100)
    x = random(4)
    linked.q_proj(x)
    linked.k_proj.load_state_dict(other.k_proj.state_dict())
    assert torch.equal(linked.k_proj(x), other.k_proj(x))


def test_a_shallow_copy_works_alone(products: list[int]) -> None:
    alone, linked = pair()
    replica = copy.copy(linked.q_proj)
    x = random(4)
    assert torch.equal(replica(x), alone.q_proj(x))
    assert linked.q_proj._siblings.pending is None


def test_members_that_are_never_called(products: list[int]) -> None:
    _, linked = pair()
    for _ in range(5):
        linked.q_proj(random(4))
    assert products[-1] == 1
    assert linked.q_proj._siblings.pending is None


def test_nothing_is_kept_alive() -> None:
    _, linked = pair()
    linked(random(4))
    watched = weakref.ref(linked.k_proj)
    gc.disable()
    try:
        del linked
        assert watched() is None
    finally:
        gc.enable()


def test_a_member_that_is_gone(products: list[int]) -> None:
    alone, linked = pair()
    linked.k_proj = nn.Linear(COLUMNS, 24, dtype=torch.bfloat16)
    x = random(4)
    assert torch.equal(linked.q_proj(x), alone.q_proj(x))
    assert torch.equal(linked.v_proj(x), alone.v_proj(x))
    assert products == [1] * 4


def test_only_whole_sets_of_quantized_linears_are_linked() -> None:
    module = Attention()
    module.k_proj = nn.Linear(COLUMNS, 24)
    siblings.link(module)
    assert module.q_proj._siblings is None
