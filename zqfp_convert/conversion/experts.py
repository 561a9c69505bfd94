"""Quantizes the experts of a block, each by the tokens that are routed to it.

A Hessian of fewer tokens than the matrix has columns is singular: the directions that those tokens
leave open cost nothing there, and a solver would put its errors into them. Experts with so few
tokens are solved with the moments of the tokens of all experts of the block, matrices of the same
kind together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import nn

from zqfp_convert.calibration.experts import STAGES, Arrivals, moments, pool
from zqfp_convert.calibration.stages import Moments
from zqfp_convert.model.experts import Experts
from zqfp_convert.parallel import ALONE, World

Solve = Callable[[list[list[str]], Moments], None]


@dataclass(frozen=True)
class Seen:
    """How many tokens a matrix of an expert was calibrated on, and whether others' had to do."""

    tokens: int
    pooled: bool


def quantize_experts(
    path: str,
    places: Collection[str],
    student: nn.Module,
    teacher: nn.Module | None,
    batches: list[Arrivals],
    solve: Solve,
    world: World = ALONE,
    share: Callable[[list[str]], None] = lambda places: None,
) -> dict[str, Seen]:
    """Quantize those experts' matrices, of the ones of that name in a block, that are `places`.

    Args:
        path: the experts' name in the block.
        places: names of linears in the block that are to be quantized.
        student: the block, in which `solve` puts quantized linears.
        teacher: the original block, or None.
        batches: what reaches the experts.
        solve: quantizes linears by their names, those of each list together, which share an input;
            the moments are those of every such input.
        world: processes with batches of their own, that take turns at solving the experts.
        share: gives all processes what each has solved of a stage, given all its linears.

    Returns:
        What each matrix has seen; those that could not be solved, for no expert saw a token, lack.
    """
    experts = student.get_submodule(path)
    assert isinstance(experts, Experts)
    seen: dict[str, Seen] = {}
    for stage in STAGES:
        members: dict[int, list[str]] = {}
        for expert in range(len(experts)):
            named = [f"{path}.{expert}.{name}" for name in stage]
            found = [place for place in named if place in places]
            if found:
                members[expert] = found
        total: Moments | None = None
        waiting: dict[int, int] = {}  # tokens of experts with too few
        turn = 0
        for expert, own in moments(path, stage, members, student, teacher, batches, world):
            tokens = 0 if own is None else own.tokens
            total = total if own is None else pool(total, own)
            if own is None or tokens < len(own.hessian):
                waiting[expert] = tokens
                continue
            seen |= dict.fromkeys(members[expert], Seen(tokens, pooled=False))
            if turn % world.size == world.rank:
                solve([members[expert]], own)
            turn += 1
        if total is not None and waiting:
            for expert, tokens in waiting.items():
                seen |= dict.fromkeys(members[expert], Seen(tokens, pooled=True))
            mine = list(waiting)[world.rank :: world.size]
            if mine:
                solve([members[expert] for expert in mine], total)
        share([place for named in members.values() for place in named if place in seen])
    return seen
