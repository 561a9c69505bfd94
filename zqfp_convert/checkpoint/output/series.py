"""Files of a partial output, one after the other, written while the next one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from torch import Tensor

from zqfp_convert.checkpoint.output.partial import Partial


class Series:
    """Files that come in order; use as a context, which waits for the last one to be written.

    Processes of a world take turns at writing them; what one has written all record before the next
    one is begun.

    Attributes:
        done: how many of them are whole, from the first on, or being written.
    """

    def __init__(self, partial: Partial, files: Sequence[str], *, shared: bool = True) -> None:
        """`files` are all of them, relative to the partial folder.

        Without `shared` the first process, which alone has the tensors then, writes them all.
        """
        self.partial, self.files = partial, files
        self._turns = partial.world.size if shared else 1
        self.done = partial.whole(files)
        self._thread = ThreadPoolExecutor(1, "write")
        self._writing: deque[Future[Any] | None] = deque()  # None: by another process

    def __enter__(self) -> Series:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self.wait()

    def add(
        self,
        tensors: dict[str, Tensor],
        about: Mapping[str, Any] | None = None,
        *,
        waiting: int = 0,
    ) -> None:
        """Have the next file written, after those before it, of which so many may wait still.

        Of several processes none waits still: what is not recorded is lost when one fails.

        Raises:
            OutputError: one of those before could not be written.
        """
        world = self.partial.world
        for written in self._writing:
            if written is not None and written.done():
                written.result()  # an error is raised at once, not when those before are done
        self.wait(waiting if world.size == 1 else 0)
        file = self.files[self.done]
        if world.size == 1:  # recorded by the thread, at once
            self._writing.append(self._thread.submit(self.partial.save, file, tensors, about))
        elif self.writes_next:
            self._writing.append(self._thread.submit(self.partial.write, file, tensors, about))
        else:
            self._writing.append(None)
        self.done += 1

    def wait(self, waiting: int = 0) -> None:
        """Wait until all files so far are on the disk, or all but so many.

        Raises:
            OutputError: one of them could not be written.
        """
        while len(self._writing) > waiting:
            writer = self._writer(-len(self._writing))
            first = self._writing.popleft()
            record: Any = None if first is None else first.result()
            if self.partial.world.size > 1:
                self.partial.take(self.partial.world.broadcast(record, writer))

    @property
    def writes_next(self) -> bool:
        """Whether it is this process's turn to write the next file."""
        return self._writer() == self.partial.world.rank

    def _writer(self, step: int = 0) -> int:
        """Whose turn the next file is, or the one so many steps on."""
        return (self.done + step) % self._turns

    def load(self, number: int) -> dict[str, Tensor]:
        """The tensors of a file that is done."""
        self.wait()
        return self.partial.load(self.files[number])

    def about(self, number: int) -> dict[str, Any]:
        """What was said of a file that is done."""
        self.wait()
        found: dict[str, Any] = self.partial.record(self.files[number])["about"]
        return found
