"""Ctrl-C that is not lost.

Python raises KeyboardInterrupt wherever the program happens to be, and drops it in destructors and
callbacks of the garbage collector. So it is remembered, and raised again where progress is told.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Whether somebody has pressed Ctrl-C."""

    def __init__(self) -> None:
        self._asked = False

    def check(self) -> None:
        """Raise what was dropped.

        Raises:
            KeyboardInterrupt: Ctrl-C has been pressed.
        """
        if self._asked:
            raise KeyboardInterrupt

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """While this context is open, Ctrl-C is remembered, and raises as always."""
        usual = signal.getsignal(signal.SIGINT)
        here = threading.current_thread() is threading.main_thread()  # else Python forbids it
        if not here or usual is not signal.default_int_handler:
            yield
            return

        def remember(number: int, frame: FrameType | None) -> None:
            self._asked = True
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, usual)
