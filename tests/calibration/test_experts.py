"""Moments of what reaches experts: the tokens routed to each, in both models, and all of them."""

from __future__ import annotations

import copy

import pytest
import torch
from dequantized import seen
from mixtures import EXPERTS, random_mixture
from torch import Tensor, nn

from zqfp_convert.calibration import experts as statistics
from zqfp_convert.calibration.experts import arrivals, moments, pool, sums_bytes, together
from zqfp_convert.calibration.stages import Moments
from zqfp_convert.calibration.stream import Call, Stream
from zqfp_convert.conversion.experts import quantize_experts
from zqfp_convert.errors import SourceError
from zqfp_convert.model.experts import DOWN, GATE, UP, mixtures
from zqfp_convert.model.unfused import unfuse

WIDTH = 32


def block_of(arch: str) -> tuple[nn.Module, str]:
    """The mixture of one block, its experts unfused, with random weights; and their name in it."""
    whole = random_mixture(arch)
    module = whole.model.layers[1 if arch == "llama4" else 0]
    block = module.feed_forward if arch == "llama4" else module.mlp
    tensors = dict(block.experts.named_parameters())
    unfuse(block)
    for name, fused in block.experts.fused.items():
        for number, expert in enumerate(block.experts):
            for part, local in enumerate(fused.parts):
                value = fused.part(tensors[name][number], part)
                setattr(expert.get_submodule(local), fused.leaf, nn.Parameter(value))
    block.requires_grad_(False)
    return block, "experts"


def streams(tokens: int = 40) -> tuple[Stream, Stream]:
    student = [torch.randn(2, tokens, WIDTH) for _ in range(3)]
    return Stream(student), Stream([hidden + 0.1 * torch.randn_like(hidden) for hidden in student])


def calls(index: int) -> Call:
    return Call((), {})


def routes(block: nn.Module, hidden: Tensor) -> list[Tensor]:
    """The tokens of each expert, by the model's own router, one token after the other."""
    found: list[list[int]] = [[] for _ in range(EXPERTS)]
    flat = hidden.flatten(0, 1)
    _, _, index = block.gate(flat)
    for token, chosen in enumerate(index.tolist()):
        for expert in chosen:
            found[expert].append(token)
    return [torch.tensor(each, dtype=torch.int64) for each in found]


@pytest.mark.parametrize("at_once", [1, EXPERTS])
def test_moments_of_the_routed_tokens(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(statistics.SUMS_BYTES, "cpu", at_once * 4 * WIDTH**2 * 2)
    block, path = block_of("mixtral")
    teacher = copy.deepcopy(block)
    student_stream, teacher_stream = streams()
    batches = arrivals(path, block, student_stream, teacher, teacher_stream, calls)
    found = dict(moments(path, (GATE, UP), range(EXPERTS), block, teacher, batches))
    downs = dict(moments(path, (DOWN,), range(EXPERTS), block, teacher, batches))
    for expert in range(EXPERTS):
        inputs, originals, inner = [], [], []
        for hidden, before in zip(student_stream.hidden, teacher_stream.hidden, strict=True):
            rows = routes(block, hidden)[expert]
            inputs.append(hidden.flatten(0, 1)[rows])
            originals.append(before.flatten(0, 1)[rows])  # the same tokens
            part = block.experts[expert]
            x = inputs[-1]
            inner.append(torch.nn.functional.silu(part.gate_proj(x)) * part.up_proj(x))
        exact, original = torch.cat(inputs), torch.cat(originals)
        x = seen(exact)
        own = found[expert]
        assert own is not None
        assert own.tokens == len(x) > 0
        torch.testing.assert_close(own.hessian, x.T @ x / len(x))
        torch.testing.assert_close(own.cross, original.T @ x / len(x))
        torch.testing.assert_close(own.rounding, (exact - x).square().mean(0))
        y = seen(torch.cat(inner))
        down = downs[expert]
        assert down is not None
        torch.testing.assert_close(down.hessian, y.T @ y / len(y), rtol=1e-3, atol=1e-5)


def test_tokens_that_the_original_sends_elsewhere() -> None:
    block, path = block_of("llama4")
    student_stream, teacher_stream = streams()
    batches = arrivals(path, block, student_stream, block, teacher_stream, calls)
    lost = 0
    for batch in batches:
        assert batch.original is not None
        for rows in batch.rows:
            assert batch.hidden[rows].any(-1).all()
            lost += int((~batch.original[rows].any(-1)).sum())
    assert lost > 0  # else this test says nothing
    for expert, own in moments(path, (GATE, UP), range(EXPERTS), block, block, batches):
        assert own is not None
        want, count = torch.zeros(WIDTH, WIDTH), 0
        for batch in batches:
            for row in batch.rows[expert].tolist():
                here, before = batch.hidden[row], batch.original[row]
                before = before if before.any() else here
                want += before[:, None] * seen(here[None])
                count += 1
        torch.testing.assert_close(own.cross, want / count, rtol=1e-4, atol=1e-6)


def test_pooled_moments_are_those_of_all_tokens() -> None:
    torch.manual_seed(3)
    parts = [torch.randn(count, 5) for count in (3, 10, 1)]

    def of(x: Tensor) -> Moments:
        return Moments(x.T @ x / len(x), 2 * x.T @ x / len(x), x.square().mean(0), len(x))

    total = None
    each = [of(part) for part in parts]
    before = each[0].hessian.clone()
    for one in each:
        total = pool(total, one)
    want = of(torch.cat(parts))
    assert total is not None
    assert total.tokens == 14
    torch.testing.assert_close(total.hessian, want.hessian)
    torch.testing.assert_close(total.cross, want.cross)
    torch.testing.assert_close(total.rounding, want.rounding)
    assert torch.equal(each[0].hessian, before)


def test_who_is_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens than columns: all experts' moments. Enough: an expert's own."""
    block, path = block_of("mixtral")
    stream = Stream([torch.randn(1, 30, WIDTH)])
    rows = [torch.arange(30), torch.arange(30), torch.arange(0), torch.arange(3)]
    batch = arrivals(path, block, stream, None, None, calls)[0]
    more = statistics.Arrivals(batch.hidden.repeat(2, 1), None, [r.repeat(2) for r in rows])
    solved: list[tuple[list[list[str]], Moments]] = []
    places = [f"{path}.{e}.{name}" for e in range(EXPERTS) for name in (GATE, UP, DOWN)]
    seen_by = quantize_experts(
        path, places, block, None, [more], lambda names, own: solved.append((names, own))
    )
    assert seen_by.keys() == set(places)
    for place, one in seen_by.items():
        expert, name = int(place.split(".")[1]), place.rpartition(".")[2]
        assert one.tokens == 2 * len(rows[expert])
        columns = block.get_submodule(place).in_features
        assert one.pooled is (one.tokens < columns), name
    names, own = solved[2]  # of gates and ups, what is left
    assert [each[0].split(".")[1] for each in names] == ["2", "3"]
    assert own.tokens == 60 + 60 + 6
    alone = quantize_experts(path, places[:1], block, None, [more], lambda names, own: None)
    assert alone.keys() == {places[0]}


def test_no_token_at_all() -> None:
    block, path = block_of("mixtral")
    empty = statistics.Arrivals(torch.zeros(4, WIDTH), None, [torch.arange(0)] * EXPERTS)
    places = [f"{path}.{e}.{DOWN}" for e in range(EXPERTS)]
    assert quantize_experts(path, places, block, None, [empty], lambda names, own: None) == {}


def test_infinity_is_named() -> None:
    block, path = block_of("mixtral")
    hidden = torch.full((8, WIDTH), float("inf"))
    batch = statistics.Arrivals(hidden, None, [torch.arange(8)] * EXPERTS)
    with pytest.raises(SourceError, match=r"experts\.0\.up_proj"):
        list(moments(path, (GATE, UP), range(EXPERTS), block, None, [batch]))


def test_memory_is_bounded() -> None:
    cpu = torch.device("cpu")
    assert together(1 << 20, cpu, cross=True) == 1
    assert together(1024, cpu, cross=False) == 2 * together(1024, cpu, cross=True)
    block, _ = block_of("mixtral")
    assert sums_bytes(block, cpu, cross=True) == EXPERTS * 2 * 4 * 48**2
    assert sums_bytes(nn.Linear(4, 4), cpu, cross=True) == 0
    assert list(mixtures(block)) == ["experts"]
