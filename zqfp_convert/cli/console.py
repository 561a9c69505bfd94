"""What all commands share: where they print, how they show progress and errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

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

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
JsonFile = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write the figures to FILE as one JSON object; - prints it, and nothing else.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

Report = Callable[[str, int, int], None]


@contextmanager
def errors(debug: bool, as_json: bool = False) -> Iterator[None]:
    """Turns a user's error into a message and exit code 2, and Ctrl-C into exit code 130.

    With `as_json` the message is on standard output too, as `{"error": …}`.
    """
    _hush_libraries()
    try:
        yield
    except ZqfpError as error:
        if debug:
            raise
        if as_json:
            print_json({"error": str(error)})
        err.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as error:
        told = str(error) or "Stopped. Nothing half-written was left behind."
        err.print(escape(told), soft_wrap=True)
        raise typer.Exit(130) from None


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """A progress bar on a terminal's standard error; silent when quiet or not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda text, done, total: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def report(text: str, done: int, total: int) -> None:
            bar.update(task, description=escape(text), completed=done, total=total or None)

        yield report


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
