"""The command `zqfp-convert`: `zqfp-convert MODEL OUT/` converts, its sub-commands do the rest."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from zqfp_convert import __version__
from zqfp_convert.cli import (
    bench,
    compare,
    convert,
    demo,
    evaluate,
    export,
    generate,
    inspect,
    push,
    report,
    tune,
    verify,
)

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("convert")(convert.command)
app.command("inspect")(inspect.command)
app.command("verify")(verify.command)
app.command("evaluate")(evaluate.command)
app.command("report")(report.command)
app.command("push")(push.command)
app.command("compare")(compare.command)
app.command("generate")(generate.command)
app.command("export")(export.command)
app.command("bench")(bench.command)
app.command("tune")(tune.command)
app.command("demo")(demo.command)

OWN_OPTIONS = ("-h", "--help", "--version", "--install-completion", "--show-completion")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zqfp-convert {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    shown: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Turn a language model into a packed FP4 checkpoint for the FP8 tensor cores of Hopper GPUs.

    [bold]zqfp-convert MODEL OUT/[/]  convert (all options: zqfp-convert convert -h)
    [bold]zqfp-convert MODEL OUT/ --dry-run[/]  only say what would be done
    [bold]zqfp-convert MODEL OUT/ --recipe fast[/]  no calibration: seconds, less faithful
    [bold]zqfp-convert MODEL OUT/ --calibration T.txt[/]  calibrate on your own text

    MODEL is a folder or a name on the Hub. A folder named like a command is reached as ./inspect.
    """


def arguments(given: list[str]) -> list[str]:
    """The arguments with the command `convert` put in where no command is named."""
    names = {command.name for command in app.registered_commands}
    if not given or given[0] in names or given[0] in OWN_OPTIONS:
        return given
    return ["convert", *given]


def main() -> None:
    """Run the command line."""
    app(arguments(sys.argv[1:]), prog_name="zqfp-convert")
