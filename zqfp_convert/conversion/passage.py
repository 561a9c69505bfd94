"""How hidden states move on within a block while its linears are solved, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from zqfp_convert.calibration.halfway import Halfway, Moves, Shortcut, halfway, shortcut
from zqfp_convert.calibration.stream import Call
from zqfp_convert.conversion.states import States
from zqfp_convert.parallel import World
from zqfp_convert.plan import Plan, PlannedLayer, spare_bytes


@dataclass
class Passage:
    """The way of both streams through one block.

    The original's states move to a place within it with the statistics of the last linear before
    that, the student's with those of the next stage, once that linear is solved. Where they can
    move is tried out on one window, as `States.trial` has it.
    """

    plan: Plan
    world: World
    states: States
    student: nn.Module
    teacher: nn.Module | None
    layers: dict[str, PlannedLayer]
    trial: tuple[Call, Tensor]
    spare: bool  # whether inputs may be kept: not once memory has run out
    _way: Halfway | None = None
    _by: Shortcut | None = None
    _there: bool = False

    def moves(self, done: list[str], stage: list[str], *, last: bool, again: bool) -> Moves:
        """How states move with the statistics of a stage.

        Args:
            done: the linears of this stage and of those before it.
            stage: those of this one that share their input.
            last: whether it is the last one of the block.
            again: whether there will be statistics of a later one, experts aside.
        """
        place, by, found = (None if self._there else self._way), self._by, None
        if self._way is None and not last:
            self._way, self._by = found, _ = self._find(done, stage, again=again)
        ahead = None if self.teacher is None else found
        keep = self._by.inputs if found is not None and self._by is not None else None
        if place is not None or ahead is not None:
            self.states.leave_entrance()
        return Moves(place, by if place else None, ahead, keep)

    def leave(self, moves: Moves) -> None:
        """Let blocks run from where the states have moved to."""
        if moves.place is not None:
            moves.place.leave(self.student)
            self._there = True
        if moves.ahead is not None and self.teacher is not None:
            moves.ahead.leave(self.teacher)

    def _find(
        self, done: list[str], stage: list[str], *, again: bool
    ) -> tuple[Halfway | None, Shortcut | None]:
        """A place behind linears that are done, if there is one, and a shortcut to it.

        Processes, which have shares of the text that differ in size, all find the same.
        """
        if not self.world.every(lambda: self.states.alike):
            return None, None
        block = self.student if self.teacher is None else self.teacher
        call, hidden = self.trial
        left = [name for name in self.layers if name not in done]
        place = self.world.agree(lambda: halfway(block, done, left, call, hidden))
        here = [self.layers[name] for name in stage]
        if place is None or not again or not self.world.every(lambda: self._room(here)):
            return place, None
        return place, self.world.agree(lambda: shortcut(place, block, stage, call, hidden))

    def _room(self, stage: list[PlannedLayer]) -> bool:
        """Whether there is room for all inputs of a stage, beside what solving it takes."""
        hidden = self.states.student.hidden[0]
        tokens = len(self.states.student.hidden) * hidden[..., 0].numel()
        inputs = tokens * stage[0].columns * hidden.element_size()
        there = self.spare and self.plan.states == "device"
        return there and inputs <= spare_bytes(self.plan, stage)
