"""Hidden states of all text at the entrance of one block, in the original and in the student."""

from __future__ import annotations

from collections.abc import Callable, MutableSequence
from pathlib import Path

import torch
from torch import Tensor, nn

from zqfp_convert.calibration.shelf import Shelf
from zqfp_convert.calibration.stream import Call, Entrance, Stream, batches_of
from zqfp_convert.model.blocks import Blocks
from zqfp_convert.parallel import ALONE, World
from zqfp_convert.plan import Place


class States:
    """The calibration streams; of several processes each has those of its share of the windows.

    Attributes:
        entrance: how blocks are called.
        student: hidden states behind the quantized blocks, of the first text.
        teacher: of the original model, of all texts; None where nothing needs them.
        size: windows of a batch, at most.
    """

    def __init__(
        self,
        blocks: Blocks,
        texts: list[Tensor],
        size: int,
        device: torch.device,
        *,
        original: bool,
        place: Place = "device",
        folder: Path | None = None,
        world: World = ALONE,
    ) -> None:
        """Enter the first block with windows of several texts, each int64 `[samples, seq_len]`.

        Calibration is on the first text; the original alone runs on the others. `place` says where
        the states lie; those in a file do in the folder.
        """
        self.size, self._world = size, world
        self._whole = texts
        texts = [text[world.part(len(text))] for text in texts]
        batches = [batches_of(text, size * text.shape[1], device) for text in texts]
        self.entrance = Entrance(blocks, [batch for text in batches for batch in text])
        student = _shelf(place, device, folder, f"student-{world.rank}")
        teacher = _shelf(place, device, folder, f"teacher-{world.rank}") if original else None
        with world.attempt():
            for index in range(sum(map(len, batches))):
                entering = self.entrance.enter(index)
                if index < len(batches[0]):
                    student.append(entering)
                if teacher is not None:
                    teacher.append(entering)
        self.student = Stream(student)
        self.teacher = None if teacher is None else Stream(teacher)
        self._between = False

    @property
    def alike(self) -> bool:
        """Whether both streams, if there are two, have the same text."""
        return self.teacher is None or len(self.teacher.hidden) == len(self.student.hidden)

    @property
    def moved(self) -> bool:
        """Whether some states have left the entrance of the block and others are still there.

        In any process, and all have to ask.
        """
        teacher = 0 if self.teacher is None else self.teacher.moved
        here = self._between or self.student.moved > 0 or teacher > 0
        return not self._world.every(lambda: not here)

    def calls(self, block: int) -> Callable[[int], Call]:
        """The arguments of a block's call, by the batch's index."""
        return self.entrance.calls(block)

    def trial(self, block: int) -> tuple[Call, Tensor]:
        """A call of a block for one window, and the student's hidden states of that."""
        return self.entrance.trial(block, self.student.hidden[0])

    def advance(self, student: nn.Module, teacher: nn.Module, calls: Callable[[int], Call]) -> None:
        """Move through a block, quantized and original."""
        self._between |= self._world.size > 1  # others may get to the end of it
        with self._world.attempt():
            self.student.advance(student, calls)
            if self.teacher is not None:
                self._between = True
                self.teacher.advance(teacher, calls)
        self._between = False

    def leave_entrance(self) -> None:
        """Say that some will move to a place within the block."""
        self._between = True

    def split(self, size: int) -> None:
        """Go on with batches of at most so many windows."""
        self.size = size
        dimension = self.entrance.dimension(self.student.hidden[0])
        self.entrance.split(size)
        for stream in (self.student, self.teacher):
            if stream is not None:
                stream.split(size, dimension)

    def checksums(self) -> list[int]:
        """What tells these states, to the bit, from nearly all others."""
        streams = [self.student] if self.teacher is None else [self.student, self.teacher]
        here = [stream.checksum() for stream in streams]
        return [checksum for each in self._world.gather(here) for checksum in each]

    def original(self) -> Tensor | None:
        """The original's hidden states of all windows, on the CPU of the leading process alone."""
        assert self.teacher is not None
        world = self._world
        if world.size == 1:
            return torch.cat([hidden.cpu() for hidden in self.teacher.hidden])
        left = list(self.teacher.hidden)
        texts = []
        for text in self._whole:
            count, mine = len(text[world.part(len(text))]), list[Tensor]()
            while sum(len(hidden) for hidden in mine) < count:
                mine.append(left.pop(0))
            for source, shapes in enumerate(world.gather([tuple(h.shape) for h in mine])):
                for at, shape in enumerate(shapes):
                    like = self.teacher.hidden[0]
                    own = source == world.rank
                    hidden = mine[at].contiguous() if own else like.new_empty(shape)
                    world.send_(hidden, source)
                    if world.leads:
                        texts.append(hidden.cpu())
        return torch.cat(texts) if world.leads else None


def _shelf(
    place: Place, device: torch.device, folder: Path | None, name: str
) -> MutableSequence[Tensor]:
    """Where the states of one stream will lie."""
    match place:
        case "device":
            return []
        case "host":
            return Shelf(device)
        case "file":
            assert folder is not None
            folder.mkdir(exist_ok=True)
            return Shelf(device, folder / name)
