"""In which order a block's linears are solved, and which statistics each of them sees."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, configuration, random_model, token_ids
from dequantized import seen
from torch import Tensor, nn

from zqfp_convert.calibration import stages
from zqfp_convert.calibration.halfway import Moves, halfway
from zqfp_convert.calibration.stages import statistics, trace
from zqfp_convert.calibration.stream import Call, Entrance, Stream, outputs_of
from zqfp_convert.errors import SourceError
from zqfp_convert.model.blocks import Blocks, find_blocks, get_linear, linears, weight_matrix

LIKE_LLAMA = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
LIKE_NEOX = [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]]
STAGES = {
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "gpt_neox": LIKE_NEOX,
    "bloom": LIKE_NEOX,
    # In parallel blocks attention and feed-forward share their input.
    "falcon": [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]],
    "cohere": [["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj"], ["down_proj"]],
}


def block_of(arch: str, batches: list[Tensor]) -> tuple[Blocks, Entrance, Stream]:
    blocks = find_blocks(random_model(configuration(arch)))
    entrance = Entrance(blocks, batches)
    return blocks, entrance, Stream(entrance.first())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_order(arch: str) -> None:
    blocks, entrance, stream = block_of(arch, [token_ids()])
    names = [name for name, _ in linears(blocks.modules[0])]
    for given in (names, names[::-1]):
        stages = trace(blocks.modules[0], given, entrance.calls(0)(0), stream.hidden[0])
        leaves = [[name.rpartition(".")[2] for name in stage] for stage in stages]
        assert leaves == STAGES.get(arch, LIKE_LLAMA)


@torch.no_grad()
def test_linears_that_are_not_named_or_do_not_run_are_left_out() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.never = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    call = Call((), {})
    block = Block()
    assert trace(block, ["never", "b", "a"], call, torch.randn(1, 2, 3)) == [["a"], ["b"]]
    assert trace(block, ["b"], call, torch.randn(1, 2, 3)) == [["b"]]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "falcon"])
@torch.no_grad()
def test_statistics(arch: str) -> None:
    """H and C by their definition, behind a changed prefix and beside the original."""
    blocks, entrance, teacher_stream = block_of(arch, [token_ids(2), token_ids(1, seed=9)])
    teacher, calls = blocks.modules[0], entrance.calls(0)
    student = copy.deepcopy(teacher)
    names = [name for name, _ in linears(teacher)]
    stages = trace(student, names, calls(0), teacher_stream.hidden[0])
    generator = torch.Generator().manual_seed(3)
    noise = [0.1 * torch.randn(h.shape, generator=generator) for h in teacher_stream.hidden]
    student_stream = Stream([h + n for h, n in zip(teacher_stream.hidden, noise, strict=True)])
    student.get_submodule(stages[0][0]).weight.data *= 1.1

    def inputs(block: nn.Module, stream: Stream, name: str) -> Tensor:
        found: list[Tensor] = []
        hook = block.get_submodule(name).register_forward_pre_hook(
            lambda m, args: found.append(args[0].flatten(0, -2).clone())
        )
        for index, hidden in enumerate(stream.hidden):
            calls(index).run(block, hidden)
        hook.remove()
        return torch.cat(found)

    for stage in stages:
        found = statistics(stage, student, student_stream, teacher, teacher_stream, calls)
        hessian, cross, rounding = found.hessian, found.cross, found.rounding
        assert found.outputs is None
        for name in stage:
            exact = inputs(student, student_stream, name).double()
            x = seen(exact.float()).double()
            want = (exact - x).square().mean(0)
            assert float(want.min()) >= 0
            assert float(want.max()) > 0
            torch.testing.assert_close(rounding.double(), want, rtol=1e-4, atol=1e-9)
            original = inputs(teacher, teacher_stream, name).double()
            assert found.tokens == len(x) == 3 * 24
            torch.testing.assert_close(hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
            assert cross is not None
            want = original.T @ x / len(x)
            torch.testing.assert_close(cross.double(), want, rtol=1e-4, atol=1e-6)
            assert not torch.allclose(cross, hessian, rtol=1e-3, atol=1e-6)
        alone = statistics(stage, student, student_stream, None, None, calls)
        assert torch.equal(alone.hessian, hessian)
        assert alone.cross is None
    place = stages[-1][0]
    weight, rows = weight_matrix(get_linear(teacher, place)), len(x)
    outputs = torch.cat(
        [outputs_in(teacher, place, calls(i), h) for i, h in enumerate(teacher_stream.hidden)]
    )
    streams = (student_stream, teacher, teacher_stream)
    moved = statistics(stages[-1], student, *streams, calls, last=True)
    assert torch.equal(moved.hessian, hessian)
    if arch != "gpt2":  # of which this linear has a bias
        assert moved.cross is None
        assert moved.outputs is not None
        have = moved.outputs.double()
        torch.testing.assert_close(have, outputs.double().T @ x / rows, rtol=1e-4, atol=1e-6)
        want = weight.double() @ cross.double()
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-6)
    else:
        assert moved.outputs is None
        assert torch.equal(moved.cross, cross)


def outputs_in(block: nn.Module, name: str, call: Call, hidden: Tensor) -> Tensor:
    made: dict[str, Tensor] = {}
    with outputs_of({name: block.get_submodule(name)}, made):
        call.run(block, hidden)
    return made[name].flatten(0, -2)


@torch.no_grad()
def test_outputs_are_kept_as_they_were_made() -> None:
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            y += x
            return y

    block, x = Adding(), torch.randn(2, 4, 3)
    assert torch.equal(outputs_in(block, "linear", Call((), {}), x), block.linear(x).flatten(0, 1))


@torch.no_grad()
def test_activations_that_are_not_finite() -> None:
    blocks, entrance, stream = block_of("llama", [token_ids()])
    stream.hidden[0][0, 3] = float("inf")
    with pytest.raises(SourceError, match="NaN or infinity") as raised:
        statistics(["self_attn.q_proj"], blocks.modules[0], stream, None, None, entrance.calls(0))
    assert "self_attn.q_proj" in raised.value.where


@torch.no_grad()
def test_what_is_done_with_is_gone_while_a_block_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch only its quantized inputs wait for the original's, and nothing for the next."""
    blocks, entrance, stream = block_of("llama", [token_ids(2), token_ids(1, seed=9)])
    block = blocks.modules[0]
    made: list[weakref.ref[Tensor]] = []
    waiting: list[int] = []
    run, simulate = stages._input, stages.fp8.simulate

    def noted(tensor: Tensor) -> Tensor:
        made.append(weakref.ref(tensor))
        return tensor

    def watched(*args: Any) -> Tensor:
        waiting.append(sum(one() is not None for one in made))
        return noted(run(*args))

    monkeypatch.setattr(stages, "_input", watched)
    monkeypatch.setattr(stages.fp8, "simulate", lambda values: noted(simulate(values)))
    name = list(linears(block))[-1][0]
    statistics([name], copy.deepcopy(block), stream, block, stream, entrance.calls(0))
    assert waiting == [0, 1, 0, 1]  # the student's and the teacher's turn, for each batch


@torch.no_grad()
def test_the_original_moves_on_behind_a_stage_and_gives_the_same() -> None:
    blocks, entrance, stream = block_of("llama", [token_ids(2), token_ids(1, seed=9)])
    block, calls, ids = blocks.modules[0], entrance.calls(0), list(stream.hidden)
    order = trace(block, [name for name, _ in linears(block)], calls(0), ids[0])
    done, left = [n for s in order[:2] for n in s], [n for s in order[2:] for n in s]
    ahead = halfway(block, done, left, calls(0), ids[0])
    assert ahead is not None
    teacher, original = copy.deepcopy(block), Stream(list(ids))
    streams = (block, stream, teacher, original)
    want = statistics(order[1], *streams, calls)
    have = statistics(order[1], *streams, calls, moves=Moves(ahead=ahead))
    behind = statistics(order[2], *streams[:2], copy.deepcopy(block), Stream(list(ids)), calls)
    ahead.leave(teacher)
    moved = statistics(order[2], *streams, calls)
    for one, other in ((want, have), (behind, moved)):
        assert torch.equal(one.hessian, other.hessian)
        assert one.cross is not None
        assert torch.equal(one.cross, other.cross)
        assert torch.equal(one.rounding, other.rounding)
    assert not any(torch.equal(a, b) for a, b in zip(original.hidden, ids, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(stream.hidden, ids, strict=True))
