"""Shows how far work is: a bar on a terminal, now and then a line elsewhere and in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zqfp_convert.cli.pace import Nested, span

Report = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and of how much."""

QUICK = 5.0  # seconds; work that takes less has no lines
OFTEN, SELDOM = 10.0, 60.0  # seconds between two lines: at first, and after LONG
LONG = 600.0


class Lines:
    """Says now and then how far work is: often at first, then once a minute."""

    def __init__(self, nested: Nested, *write: Callable[[str], None]) -> None:
        self._nested, self._write = nested, write
        self._next = nested.clock() + QUICK

    def update(self) -> None:
        """Say it, if it is time to."""
        now = self._nested.clock()
        if now < self._next:
            return
        self._next = now + (OFTEN if self._nested.whole.passed < LONG else SELDOM)
        for write in self._write:
            write(self._nested.line())


@contextmanager
def showing(
    console: Console | None,
    unit: str,
    log: Callable[[str], None] | None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Report]:
    """Shows reports on a console (None: nowhere) and in a log.

    Args:
        console: where a bar is drawn if it is a terminal, and lines are written if not.
        unit: of what is done, such as `weights` or `bytes`.
        log: takes lines.
        check: called with each report; what it raises goes to those who report.
    """
    nested = Nested(unit, time.monotonic)
    writers = [] if log is None else [log]
    if console is not None and (not console.is_terminal or console.is_dumb_terminal):
        plain = console
        writers.append(lambda line: plain.print(line, markup=False, soft_wrap=True))
        console = None
    lines = Lines(nested, *writers)

    def report(text: str, done: int, total: int) -> None:
        check()
        nested.update(text, done, total)
        lines.update()

    if console is None:
        yield report
        return
    with Live(
        get_renderable=lambda: drawn(nested), console=console, transient=True, refresh_per_second=4
    ):
        yield report


def drawn(nested: Nested) -> Group:
    """Two lines: a bar for the whole, with speed and time left; and the step that it is at."""
    grid = Table.grid(padding=(0, 1))
    share = nested.whole.share
    percent = "" if share is None else f"{share:.0%}"
    bar = ProgressBar(total=1.0, completed=share or 0.0, width=28, pulse=share is None)
    passed = span(nested.whole.passed)
    grid.add_row(f"{percent:>4}", bar, passed, nested.told())
    return Group(grid, Text(nested.step_told(), no_wrap=True, overflow="ellipsis"))
