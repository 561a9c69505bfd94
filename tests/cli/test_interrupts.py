"""Ctrl-C is noticed wherever it comes."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import typer

from zqfp_convert.cli.console import interface
from zqfp_convert.cli.interrupts import Interrupts


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def dropped() -> None:
    """Press Ctrl-C where Python drops what is raised: in a destructor."""

    class Dying:
        def __del__(self) -> None:
            press()
            sum(range(100))  # where it is raised

    Dying()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_is_raised_where_progress_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    before: Any = signal.getsignal(signal.SIGINT)
    passed = []
    with pytest.raises(typer.Exit) as ended, interface(False) as ui, ui.progress() as report:
        report("works", 1, 3)
        dropped()
        passed.append("the destructor")
        report("works", 2, 3)
        passed.append("the report")
    assert passed == ["the destructor"]
    assert ended.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_it_is_raised_at_once_elsewhere() -> None:
    interrupts = Interrupts()
    interrupts.check()
    with pytest.raises(KeyboardInterrupt), interrupts.noticed():
        press()
        sum(range(100))
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
