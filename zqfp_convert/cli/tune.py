"""`zqfp-convert tune [OUT/ ...]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from zqfp_convert.cli import console

if TYPE_CHECKING:
    from zqfp_convert.tune import Tuned


EXAMPLES = [
    ("zqfp-convert tune OUT/", ""),
    ("zqfp-convert tune --shapes 4096x14336 --tokens 1,16", ""),
]


def command(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OUT]...",
            help="Packed checkpoints, or names on the Hub, whose layers' shapes to measure. "
            "\\[default: the shapes of the table that comes with the package]",
            show_default=False,
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NxK",
            help="More shapes, N x K (outputs x inputs): 4096x14336,1024x4096. Repeat for more.",
        ),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N,N",
            help="Numbers of tokens: 1,16,8192. Repeat for more. \\[default: 1 to 8192]",
        ),
    ] = None,
    device: console.Device = None,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    log_file: console.LogFile = None,
    debug: console.Debug = False,
) -> None:
    """Measure how this Hopper GPU multiplies fastest, and keep that for its kernels.

    What is found goes into a table in the user's cache, one for each kind of GPU, and is used from
    then on; without it, the table that comes with the package. Other GPUs have nothing to tune.
    """
    with console.interface(debug, as_json=as_json, quiet=quiet, log_file=log_file) as ui:
        from zqfp_convert.tune import table_path, tune

        wanted = console.shapes("shapes", shapes)
        counts = console.numbers("tokens", tokens)
        with ui.progress("measurements") as report:
            found = list(tune(checkpoints or [], wanted, counts, device, report))
        path = table_path(device)
        ui.give({"table": str(path), "entries": [tuned.to_json() for tuned in found]})
        _show(ui, found)
        ui.print(f"kept in {path}", soft_wrap=True, markup=False)


def _show(ui: console.Interface, found: list[Tuned]) -> None:
    table = Table(box=None)
    for heading in ("N", "K", "M"):
        table.add_column(heading, justify="right")
    table.add_column("path")
    table.add_column("schedule", overflow="fold")
    for heading in ("fused, us", "expanded, us", "rate"):
        table.add_column(heading, justify="right", no_wrap=True)
    for tuned in found:
        entry, rate = tuned.entry, tuned.read_rate
        table.add_row(
            str(entry.rows),
            str(entry.columns),
            str(entry.tokens),
            tuned.path,
            "for few tokens" if tuned.decodes else _words(tuned.spelled),
            f"{entry.at_best:.2f}",
            f"{entry.expanded:.2f}",
            f"{rate / 1e12:.2f} TB/s" if rate else f"{tuned.flops / 1e12:.0f} TFLOP/s",
        )
    ui.print(table)


def _words(schedule: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in schedule.items())
