"""Statistics of the inputs of experts, each of which sees the tokens that are routed to it.

Tokens are routed as in the quantized model; the original's experts get the same tokens, so that
their inputs can be compared, wherever the original would have sent them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zqfp_convert.calibration.stages import Calls, Moments, check_finite
from zqfp_convert.calibration.stream import Call, Stream, inputs_of, stop_at
from zqfp_convert.model.experts import DOWN, GATE, UP, Experts, mixtures
from zqfp_convert.numerics import fp8
from zqfp_convert.parallel import ALONE, World
from zqfp_convert.quantize.hessian import HessianSum

STAGES = ((GATE, UP), (DOWN,))  # the linears of an expert; those with one input together
SUMS_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}  # of statistics that are collected together


@dataclass(frozen=True)
class Arrivals:
    """What reaches the experts of a block with one batch, on the CPU.

    Attributes:
        hidden: `[tokens, width]`.
        original: the same in the original model, or None.
        rows: of both, for each expert, int64.
    """

    hidden: Tensor
    original: Tensor | None
    rows: list[Tensor]


def arrivals(
    path: str,
    student: nn.Module,
    student_stream: Stream,
    teacher: nn.Module | None,
    teacher_stream: Stream | None,
    calls: Calls,
) -> list[Arrivals]:
    """What reaches the experts of that name in a block, for each batch; as in `statistics`."""
    found = []
    for index, hidden in enumerate(student_stream.hidden):
        call = calls(index)
        entering, *routing = _arguments(student, path, call, hidden)
        original = None
        if teacher is not None and teacher_stream is not None:
            original = _arguments(teacher, path, call, teacher_stream.hidden[index])[0].cpu()
        experts = student.get_submodule(path)
        assert isinstance(experts, Experts)
        rows = [row.cpu() for row in experts.rows(entering, *routing)]
        found.append(Arrivals(entering.cpu(), original, rows))
    return found


def moments(
    path: str,
    stage: tuple[str, ...],
    wanted: Iterable[int],
    student: nn.Module,
    teacher: nn.Module | None,
    batches: list[Arrivals],
    world: World = ALONE,
) -> Iterator[tuple[int, Moments | None]]:
    """Second moments of the input that the linears of a stage share, for each expert wanted.

    Experts are taken in groups, as many as there is memory for. None: no token is routed to it.
    Processes of a `world` have batches of their own, and get what all have seen.

    Raises:
        SourceError: the activations hold NaN or infinity.
    """
    ours = student.get_submodule(path)
    theirs = None if teacher is None else teacher.get_submodule(path)
    assert isinstance(ours, Experts)
    assert theirs is None or isinstance(theirs, Experts)
    left = list(wanted)
    while left:
        weight = ours[left[0]].get_submodule(stage[-1]).get_parameter("weight")
        size = together(weight.shape[1], weight.device, cross=theirs is not None)
        group, left = left[:size], left[size:]
        with world.attempt():
            sums = _sums(stage[-1], group, ours, theirs, batches)
        _sum_over(world, sums, weight, cross=theirs is not None)
        for expert in group:
            yield expert, _means(f"{path}.{expert}.{stage[-1]}", sums.pop(expert))


def together(columns: int, device: torch.device, *, cross: bool) -> int:
    """How many experts' sums for `columns` inputs are collected at once."""
    each = 4 * columns**2 * (2 if cross else 1)
    return max(1, SUMS_BYTES[device.type] // each)


def sums_bytes(block: nn.Module, device: torch.device, *, cross: bool) -> int:
    """The most that the sums of a block's experts take at once; nothing without experts."""
    most = 0
    for experts in mixtures(block).values():
        for stage in STAGES:
            columns = experts[0].get_submodule(stage[-1]).get_parameter("weight").shape[1]
            at_once = min(len(experts), together(columns, device, cross=cross))
            most = max(most, at_once * 4 * columns**2 * (2 if cross else 1))
    return most


def pool(total: Moments | None, more: Moments) -> Moments:
    """The moments of the tokens of both, kept in `total`."""
    if total is None:
        return Moments(
            more.hessian.clone(),
            None if more.cross is None else more.cross.clone(),
            more.rounding.clone(),
            more.tokens,
        )
    tokens = total.tokens + more.tokens
    pairs = [(total.hessian, more.hessian), (total.rounding, more.rounding)]
    if total.cross is not None and more.cross is not None:
        pairs.append((total.cross, more.cross))
    for one, other in pairs:
        one.lerp_(other, more.tokens / tokens)
    return Moments(total.hessian, total.cross, total.rounding, tokens)


@dataclass
class _Sums:
    inputs: HessianSum
    rounding: Tensor


def _sums(
    name: str, group: list[int], ours: Experts, theirs: Experts | None, batches: list[Arrivals]
) -> dict[int, _Sums | None]:
    """Sums over all batches; None for experts that no token reaches."""
    sums: dict[int, _Sums | None] = dict.fromkeys(group)
    device = next(ours.parameters()).device
    for batch in batches:
        hidden = batch.hidden.to(device)
        original = None if batch.original is None else batch.original.to(device)
        for expert in group:
            rows = batch.rows[expert].to(device)
            if not len(rows):
                continue
            entering = hidden[rows]
            exact = _input(ours[expert], name, entering)
            seen = fp8.simulate(exact)
            before = None
            if theirs is not None and original is not None:
                found = original[rows]
                # zeros stand for tokens that the original did not send here: they say nothing
                found = torch.where(found.any(-1, keepdim=True), found, entering)
                before = _input(theirs[expert], name, found)
            total = sums[expert]
            if total is None:
                columns = seen.shape[-1]
                inputs = HessianSum(columns, cross=before is not None, device=device)
                total = sums[expert] = _Sums(inputs, torch.zeros(columns, device=device))
            total.inputs.add(seen, before)
            total.rounding += (exact - seen).float().square().sum(0)
    return sums


def _sum_over(world: World, sums: dict[int, _Sums | None], weight: Tensor, *, cross: bool) -> None:
    """Add what other processes have seen; `weight` is one of those whose inputs these are."""
    if world.size == 1:
        return
    seen = {expert for own in world.gather([e for e, one in sums.items() if one]) for expert in own}
    columns, device = weight.shape[1], weight.device
    for expert, own in sums.items():
        if expert in seen:
            if own is None:
                inputs = HessianSum(columns, cross=cross, device=device)
                own = sums[expert] = _Sums(inputs, torch.zeros(columns, device=device))
            own.inputs.sum_over(world)
            world.sum_(own.rounding)


def _means(name: str, sums: _Sums | None) -> Moments | None:
    if sums is None:
        return None
    tokens = sums.inputs.tokens
    hessian, cross = sums.inputs.mean()
    check_finite(name, hessian, cross)
    return Moments(hessian, cross, sums.rounding / tokens, tokens)


def _input(expert: nn.Module, name: str, entering: Tensor) -> Tensor:
    """The input of a linear of an expert that gets `[tokens, width]`."""
    seen: dict[str, Tensor] = {}
    module = expert.get_submodule(name)
    with inputs_of({name: module}, seen), stop_at(module):
        expert(entering)
    return seen[name]


def _arguments(block: nn.Module, path: str, call: Call, hidden: Tensor) -> tuple[Tensor, ...]:
    """What a block calls its experts with."""
    found: list[tuple[Tensor, ...]] = []
    experts = block.get_submodule(path)
    handle = experts.register_forward_pre_hook(lambda module, args: found.append(args))
    with stop_at(experts):
        call.run(block, hidden)
    handle.remove()
    return found[0]
