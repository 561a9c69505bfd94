"""In which order the linears of a block are solved, and what statistics each of them sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zqfp_convert.calibration.halfway import NOWHERE, Halfway, Moves
from zqfp_convert.calibration.stream import Call, Stream, inputs_of, outputs_of, stop_at
from zqfp_convert.errors import SourceError
from zqfp_convert.model.blocks import bias_of, get_linear, weight_matrix
from zqfp_convert.numerics import fp8
from zqfp_convert.parallel import ALONE, World
from zqfp_convert.quantize.hessian import HessianSum

Calls = Callable[[int], Call]


@dataclass
class Moments:
    """Second moments of an input, over some tokens.

    Attributes:
        hessian: H, float32 `[K, K]`.
        cross: C, `[K, K]`, or None.
        rounding: what FP8 costs each feature, `E[(x - x^)^2]` of an input x that is quantized to
            x^, float32 `[K]`.
        tokens: how many there were.
        outputs: `W C`, `[N, K]`, of the one weight W that gets this input; it is there instead of C
            where it has fewer rows.
    """

    hessian: Tensor
    cross: Tensor | None
    rounding: Tensor
    tokens: int
    outputs: Tensor | None = None


def trace(block: nn.Module, names: Iterable[str], call: Call, hidden: Tensor) -> list[list[str]]:
    """The named linears in the order in which a block runs them, those with one input together.

    So q, k, v come before o, and gate, up before down, whatever they are called. Linears that do
    not run are left out.
    """
    seen: dict[str, Tensor] = {}
    with inputs_of({name: block.get_submodule(name) for name in names}, seen):
        call.run(block, hidden)
    stages: dict[tuple[object, ...], list[str]] = {}
    for name, x in seen.items():  # in the order of the calls; `seen` keeps the memory in use
        stages.setdefault((x.data_ptr(), x.shape, x.stride()), []).append(name)
    return list(stages.values())


def statistics(
    stage: list[str],
    student: nn.Module,
    student_stream: Stream,
    teacher: nn.Module | None,
    teacher_stream: Stream | None,
    calls: Calls,
    *,
    last: bool = False,
    moves: Moves = NOWHERE,
    world: World = ALONE,
) -> Moments:
    """The moments of the input that the linears of a stage share.

    The student is the block with all earlier stages quantized, on hidden states that came through
    the quantized blocks before; the teacher the original block on the original's hidden states.
    Without a teacher there is no C. With the `last` stage of a block the teacher's batches move
    through the block, which is run anyway; where both move within the block, `moves` says.
    Processes of a `world` have batches of their own, and get what all have seen.

    Raises:
        SourceError: the activations hold NaN or infinity.
    """
    name = stage[0]
    features = student.get_submodule(name).get_parameter("weight")
    rows = _rows_of_outputs(student, stage) if last else None
    total: HessianSum | None = None
    rounding = torch.zeros(1, device=features.device)
    with world.attempt():
        for index, hidden in enumerate(student_stream.hidden):
            call = calls(index)
            with moves.of_student(student, student_stream, index):
                exact = _input(student, name, call, hidden)
            if moves.keep is not None:
                moves.keep.append(exact)
            seen = fp8.simulate(exact)
            missing = (exact - seen).flatten(0, -2)
            lost = torch.linalg.vector_norm(missing, dim=0, dtype=torch.float32)
            rounding = rounding + lost.square()
            del exact, missing  # else they are here while the original is computed
            original = None
            if teacher is not None and teacher_stream is not None:
                at = (teacher, name, call, teacher_stream, index)
                made = rows is not None
                original = _original(*at, last=last, ahead=moves.ahead, made=made)
            if total is None:
                cross, device = teacher is not None, features.device
                total = HessianSum(seen.shape[-1], cross=cross, device=device, rows=rows)
            total.add(seen, original)
            del seen, original  # and these while the next batch is
    assert total is not None
    total.sum_over(world)
    rounding = world.sum_(rounding)
    hessian, crossed = total.mean()
    check_finite(name, hessian, crossed)
    of_inputs, of_outputs = (crossed, None) if rows is None else (None, crossed)
    return Moments(hessian, of_inputs, rounding / total.tokens, total.tokens, of_outputs)


def _rows_of_outputs(block: nn.Module, stage: list[str]) -> int | None:
    """N of the one linear of a stage, if it is known by its outputs with less work; else None.

    A bias would have to be taken from these, and what was rounded with it would be missing.
    """
    linear = get_linear(block, stage[0])
    if len(stage) > 1 or bias_of(linear) is not None:
        return None
    rows, columns = weight_matrix(linear).shape
    return rows if rows < columns else None


def check_finite(name: str, hessian: Tensor, cross: Tensor | None) -> None:
    """Refuse statistics of a layer's input that are not finite.

    Raises:
        SourceError: the activations hold NaN or infinity.
    """
    if not all(_finite(one) for one in (hessian, cross) if one is not None):
        raise SourceError(
            name,
            "NaN or infinity among its calibration activations",
            needed="finite activations",
            do="Try --device cpu (float32); if it persists, the model or the text is at fault.",
        )


def _finite(matrix: Tensor) -> bool:
    """Whether all elements are; their sum, which takes no memory, may still overflow."""
    return bool(matrix.sum().isfinite()) or all(bool(row.isfinite().all()) for row in matrix)


def _original(
    teacher: nn.Module,
    name: str,
    call: Call,
    stream: Stream,
    index: int,
    *,
    last: bool,
    ahead: Halfway | None,
    made: bool,
) -> Tensor:
    """What a linear of the original is given, or what it has `made` of that."""
    if not last and ahead is None:
        return _input(teacher, name, call, stream.hidden[index])
    seen: dict[str, Tensor] = {}
    passing = outputs_of if made else inputs_of
    with passing({name: teacher.get_submodule(name)}, seen):
        if ahead is None:
            assert stream.moved == index
            stream.move(teacher, call)
        else:
            child = teacher.get_submodule(ahead.entrance)
            with ahead.moves(teacher, stream, index), stop_at(child):
                call.run(teacher, stream.hidden[index])
    return seen[name]


def _input(block: nn.Module, name: str, call: Call, hidden: Tensor) -> Tensor:
    seen: dict[str, Tensor] = {}
    module = block.get_submodule(name)
    with inputs_of({name: module}, seen), stop_at(module):
        call.run(block, hidden)
    return seen[name]
