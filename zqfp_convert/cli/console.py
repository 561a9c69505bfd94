"""What all commands share: where they print, how they show progress and errors."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zqfp_convert.cli.interrupts import Interrupts
from zqfp_convert.cli.log import Log, redacted
from zqfp_convert.cli.progress import Report, showing
from zqfp_convert.cli.screen import RARE
from zqfp_convert.errors import OptionError, ZqfpError
from zqfp_convert.report.wording import kinds as kinds
from zqfp_convert.report.wording import size as size
from zqfp_convert.report.wording import starred as starred

if TYPE_CHECKING:
    from zqfp_convert.checkpoint.coverage import Coverage

TO_PROGRAMS = "-"  # as the name of a file: standard output, and nothing else on it
PIPED_WIDTH = 160  # columns of a table that goes to a file or a program

out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
err = Console(stderr=True, highlight=False)

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")
]
JsonFile = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="[FILE]",
        help="Write one JSON object to FILE; without FILE print it, and nothing else.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
LogFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Append what happens to FILE, as plain lines with times."),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=RARE),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 … \\[default: the first GPU]"),
]
Checkpoint = Annotated[
    str, typer.Argument(metavar="OUT", help="A packed checkpoint: a folder, or a name on the Hub.")
]

STOPPED = "Stopped. Nothing half-written was left behind."
FAILED, REFUSED, INTERRUPTED = 1, 2, 130  # exit codes


@dataclass
class Interface:
    """One command at work: what it shows, where it logs, and how it ends.

    Attributes:
        silent: nothing but errors is shown.
        as_json: whoever started it reads one JSON object.
        log: gets all that is shown, or would be if it were not silent.
        kept: a sentence for the end of a fault of program or system, on what is not lost by it.
    """

    silent: bool = False
    as_json: bool = False
    log: Log | None = None
    follows: bool = False
    interrupts: Interrupts = field(default_factory=Interrupts)
    kept: str = ""

    def follow(self) -> None:
        """Leave it to another process to show and to log what goes on."""
        self.silent = self.follows = True

    def print(self, *things: Any, soft_wrap: bool = False, markup: bool = True) -> None:
        """Show something, with rich's markup."""
        if not self.silent:
            out.print(*things, soft_wrap=soft_wrap, markup=markup)
        if self.log is not None and not self.follows:
            self.log.print(*things, markup=markup)

    def progress(self, unit: str = "") -> AbstractContextManager[Report]:
        """Shows how far work is on standard error; `unit` is of what it counts."""
        log = None if self.log is None or self.follows else self.log.write
        return showing(None if self.silent else err, unit, log, self.interrupts.check)

    def give(self, found: dict[str, Any]) -> None:
        """Print a result for programs, if it is wanted."""
        if self.as_json and not self.follows:
            print_json(found)

    def fail(self, message: str, code: int) -> typer.Exit:
        """Say why it ends, and give what to raise."""
        message = redacted(message)
        if self.as_json:
            print_json({"error": message})
        title = "" if code == INTERRUPTED else "Error: "
        err.print(f"[bold red]{title}[/]{escape(message)}", soft_wrap=True)
        if self.log is not None:
            self.log.write(title + message)
        return typer.Exit(code)


@contextmanager
def interface(
    debug: bool,
    *,
    as_json: bool = False,
    quiet: bool = False,
    log_file: Path | None = None,
) -> Iterator[Interface]:
    """What a command shows itself through; what goes wrong in it becomes a message.

    What is refused exits with 2, as wrong options do, faults of program or system with 1, Ctrl-C
    with 130.
    With `as_json` the message is on standard output too, as `{"error": …}`.
    """
    ui = Interface(quiet or as_json, as_json)
    with ExitStack() as log:
        try:
            if log_file is not None:
                ui.log = log.enter_context(Log(log_file))
            _hush_libraries()
            log.enter_context(ui.interrupts.noticed())
            yield ui
        except (typer.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt as stopped:
            raise ui.fail(str(stopped) or STOPPED, INTERRUPTED) from None
        except Exception as error:
            if ui.log is not None and not isinstance(error, ZqfpError):
                ui.log.write(traceback.format_exc())
            if debug:
                raise
            if isinstance(error, ZqfpError):
                raise ui.fail(str(error), REFUSED) from None
            raise ui.fail(f"{_told(error)} {ui.kept}".rstrip(), FAILED) from None


def _told(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError):
        return f"the system refuses: {text}."
    return (
        f"{type(error).__name__}: {text}. This should not happen: please report it, with what the "
        "same command shows with --debug added."
    )


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, ensure_ascii=False))  # noqa: T201


def numbers(option: str, given: list[str] | None) -> tuple[int, ...]:
    """Whole numbers of an option that is repeated, or given once with commas.

    Raises:
        OptionError: something else.
    """
    parts = [part for text in given or () for part in text.replace(",", " ").split()]
    for part in parts:
        if not part.isdecimal():
            raise OptionError(
                option, repr(part), needed="whole numbers", do=f"Write --{option} 1,16,8192."
            )
    return tuple(int(part) for part in parts)


def shapes(option: str, given: list[str] | None) -> list[tuple[int, int]]:
    """Shapes (N, K) of an option that is repeated, or given once with commas.

    Raises:
        OptionError: something else.
    """
    found = []
    for part in (part for text in given or () for part in text.replace(",", " ").split()):
        extents = part.lower().split("x")
        if len(extents) != 2 or not all(extent.isdecimal() for extent in extents):
            raise OptionError(
                option,
                repr(part),
                needed="shapes N x K, outputs by inputs",
                do=f"Write --{option} 4096x14336.",
            )
        found.append((int(extents[0]), int(extents[1])))
    return found


def json_target(given: str | None) -> Path | None:
    """Where a `JsonFile` goes, checked before any work; None for nowhere and standard output.

    Raises:
        OptionError: no file can be written there.
    """
    if given is None or given == TO_PROGRAMS:
        return None
    path = Path(given)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OptionError(
            f"--json {path}",
            "a folder" if path.is_dir() else "in a folder that does not exist",
            needed="the name of a file to write",
            do="Give another one, or - for standard output.",
        )
    return path


def give_json(found: dict[str, Any], given: str | None, target: Path | None) -> None:
    """Write a result to where a `JsonFile` goes."""
    if given == TO_PROGRAMS:
        print_json(found)
    if target is not None:
        target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _hush_libraries() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def coverage_table(found: Mapping[str, Coverage]) -> Table:
    """How many tokens the experts of each block were calibrated on."""
    table = Table("experts", "how many", "fewest tokens", "most", "pooled matrices", box=None)
    for name, one in found.items():
        pooled = f"{one.pooled} of {one.matrices}"
        table.add_row(escape(name), str(one.experts), f"{one.fewest:,}", f"{one.most:,}", pooled)
    return table
