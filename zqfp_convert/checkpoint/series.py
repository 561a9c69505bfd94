"""Files of a partial output, one after the other, written while the next one is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from torch import Tensor

from zqfp_convert.checkpoint.partial import Partial


class Series:
    """Files that come in order; use as a context, which waits for the last one to be written.

    Attributes:
        done: how many of them are whole, from the first on, or being written.
    """

    def __init__(self, partial: Partial, files: Sequence[str]) -> None:
        """`files` are all of them, relative to the partial folder."""
        self.partial, self.files = partial, files
        whole = (number for number, file in enumerate(files) if not partial.is_whole(file))
        self.done = next(whole, len(files))
        self._thread = ThreadPoolExecutor(1, "write")
        self._writing: Future[None] | None = None

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

    def add(self, tensors: dict[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
        """Have the next file written, after the one before it.

        Raises:
            OutputError: the one before could not be written.
        """
        self.wait()
        file = self.files[self.done]
        self._writing = self._thread.submit(self.partial.save, file, tensors, about)
        self.done += 1

    def wait(self) -> None:
        """Wait until all files so far are on the disk.

        Raises:
            OutputError: the last one could not be written.
        """
        if self._writing is not None:
            last, self._writing = self._writing, None
            last.result()

    def load(self, number: int) -> dict[str, Tensor]:
        """The tensors of a file that is done."""
        self.wait()
        return self.partial.load(self.files[number])

    def about(self, number: int) -> dict[str, Any]:
        """What was said of a file that is done."""
        self.wait()
        found: dict[str, Any] = self.partial.record(self.files[number])["about"]
        return found
