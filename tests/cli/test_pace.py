"""Speed and time left, from what work reports, by a clock that the test turns."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest
from rich.console import Console

from zqfp_convert.cli import progress
from zqfp_convert.cli.pace import Nested, Pace, span, speed


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_time_left() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.share is None
    for now, done in ((101.0, 0), (110.0, 10), (120.0, 30), (130.0, 50)):
        clock.now = now
        pace.update(done, 100)
    assert pace.rate == 2.0  # the first step, of 10 in 9 seconds, does not count
    assert pace.left == 25.0
    clock.now = 135.0
    assert pace.left == 20.0
    clock.now = 1000.0
    assert pace.left == 0.0
    assert pace.share == 0.5


def test_what_an_earlier_run_has_done_does_not_count() -> None:
    clock = Clock()
    pace = Pace(clock)
    for now, done in ((101.0, 0), (102.0, 600), (110.0, 600), (120.0, 610), (130.0, 620)):
        clock.now = now
        pace.update(done, 700)
        assert pace.rate is None or pace.rate == 1.0
    assert pace.left == 80.0


def test_a_step_that_counts_has_a_time_of_its_own() -> None:
    clock = Clock()
    nested = Nested("weights", clock)
    nested.update("block 8/8  down_proj", 90, 100)
    for step in range(1, 4):
        clock.now += 10.0
        nested.update(f"tuning, step {step}/13", 100, 100)
    assert nested.whole.left is None
    assert nested.line() == "100%  tuning, step 3/13  (about 1:40 left of this)"
    nested.update("writing", 100, 100)
    assert nested.step is None
    assert nested.line() == "100%  writing"


def test_words() -> None:
    assert [span(42.9), span(725), span(3723)] == ["0:42", "12:05", "1:02:03"]
    assert speed(24_100_000, "weights") == "24.1 M weights/s"
    assert speed(3_140_000, "bytes") == "3.1 MB/s"
    assert speed(12, "bytes") == "12 B/s"
    assert speed(2.0, "layers") == "2.0 layers/s"
    assert speed(0.4, "blocks") == "2.5 s each"


def test_lines_at_a_sensible_rate() -> None:
    clock = Clock()
    nested, said = Nested("", clock), []
    lines = progress.Lines(nested, said.append)
    times = []
    for second in range(3600):
        clock.now = 100.0 + second
        nested.update("working", second, 3600)
        before = len(said)
        lines.update()
        if len(said) > before:
            times.append(second)
    assert times[0] == 5  # nothing of work that takes less
    assert {b - a for a, b in pairwise(times) if b < 600} == {10}
    assert {b - a for a, b in pairwise(times) if a > 600} == {60}


def test_where_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUICK", 0.0)
    monkeypatch.setattr(progress, "OFTEN", 0.0)
    logged: list[str] = []
    piped = Console(file=io.StringIO(), width=80)
    with progress.showing(piped, "", logged.append) as report:
        report("block 1/2", 0, 4)
        report("block 2/2", 2, 4)
    assert logged == ["  0%  block 1/2", " 50%  block 2/2"]
    assert piped.file.getvalue() == "".join(f"{line}\n" for line in logged)  # type: ignore[attr-defined]
    terminal = Console(
        file=io.StringIO(), width=80, force_terminal=True, _environ={"TERM": "xterm"}
    )
    with progress.showing(terminal, "", None) as report:
        report("block 1/2  q_proj", 1, 4)
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "25%" in shown
    assert "block 1/2  q_proj" in shown
    assert shown.endswith("\x1b[2K")  # and taken away again
    with progress.showing(None, "", None) as report:
        report("nobody", 1, 4)
