"""Hidden states of all text at the entrance of one block, in the original and in the student."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zqfp_convert.calibration.stream import Call, Entrance, Stream, batches_of
from zqfp_convert.model.blocks import Blocks


class States:
    """The calibration streams.

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
    ) -> None:
        """Enter the first block with windows of several texts, each int64 `[samples, seq_len]`.

        Calibration is on the first text; the original alone runs on the others.
        """
        self.size = size
        batches = [batches_of(text, size * text.shape[1], device) for text in texts]
        self.entrance = Entrance(blocks, [batch for text in batches for batch in text])
        entering = self.entrance.first()
        self.student = Stream(entering[: len(batches[0])])
        self.teacher = Stream(entering) if original else None
        self._between = False

    @property
    def moved(self) -> bool:
        """Whether an `advance` was left half-way, so that these are the states of no block."""
        teacher = 0 if self.teacher is None else self.teacher.moved
        return self._between or self.student.moved > 0 or teacher > 0

    def calls(self, block: int) -> Callable[[int], Call]:
        """The arguments of a block's call, by the batch's index."""
        return self.entrance.calls(block)

    def advance(self, student: nn.Module, teacher: nn.Module, calls: Callable[[int], Call]) -> None:
        """Move through a block, quantized and original."""
        self.student.advance(student, calls)
        if self.teacher is not None:
            self._between = True
            self.teacher.advance(teacher, calls)
            self._between = False

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
        return [stream.checksum() for stream in streams]
