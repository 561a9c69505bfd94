"""The command `zqfp-convert`: `zqfp-convert MODEL OUT/` converts, its sub-commands do the rest."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Annotated

import typer

from zqfp_convert import __version__
from zqfp_convert.cli import (
    bench,
    compare,
    completion,
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
from zqfp_convert.cli.console import INTERRUPTED, REFUSED, STOPPED, TO_PROGRAMS
from zqfp_convert.cli.screen import Commands, with_examples

app = typer.Typer(
    cls=Commands,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 refused or wrong use, 130 stopped by Ctrl-C.",
)
MAKE, LOOK, MEASURE = "Make", "Look at what was made", "Measure"
for _name, _panel, _module, _short in (
    (
        "convert",
        MAKE,
        convert,
        "Convert MODEL into a packed checkpoint (may be left out).",
    ),
    ("export", MAKE, export, "Write a checkpoint for other programs: vLLM, llama.cpp, any."),
    ("push", MAKE, push, "Upload a checkpoint to the Hub, with a model card."),
    ("inspect", LOOK, inspect, "Show a checkpoint's layers: bits a weight, errors, spans."),
    ("verify", LOOK, verify, "Prove a checkpoint: hashes, rules, an exact cast to FP8."),
    ("report", LOOK, report, "Write a page and a picture: errors, KL, what to try."),
    ("generate", LOOK, generate, "Write text with a packed model, after a prompt."),
    ("evaluate", MEASURE, evaluate, "How close a checkpoint is to its model: perplexity, KL."),
    ("bench", MEASURE, bench, "How fast it is: tokens a second, memory, beside bfloat16."),
    ("tune", MEASURE, tune, "How this Hopper GPU multiplies fastest; kept for its kernels."),
    ("compare", MEASURE, compare, "What number formats and scales would cost, in memory."),
    ("demo", MEASURE, demo, "All of it on the small model that the package carries."),
):
    _kind = with_examples(_module.EXAMPLES)
    app.command(_name, cls=_kind, rich_help_panel=_panel, short_help=_short)(_module.command)

OWN_OPTIONS = ("-h", "--help", "--version", "--install-completion", "--show-completion")
FLAGS = ("-q", "--quiet", "--debug", "--json")
FIGURES = ("bench", "compare", "evaluate")  # whose --json may name a file


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

    [bold]zqfp-convert MODEL OUT/[/]                convert a folder, or a name on the Hub
    [bold]zqfp-convert MODEL OUT/ --dry-run[/]      only say what would be done
    [bold]zqfp-convert MODEL OUT/ --recipe fast[/]  no calibration: seconds, less faithful
    [bold]zqfp-convert convert --help[/]            its options
    """


def commands() -> set[str]:
    """The names of all commands."""
    return {str(command.name) for command in app.registered_commands}


def arguments(given: list[str]) -> list[str]:
    """The arguments with what may be left out put in.

    That is `--help` where there is nothing, the command `convert`, and the `-` of a `--json` that
    names no file. `--quiet` and its like may come before a command.
    """
    if not given:
        return ["--help"]
    if given[0] in OWN_OPTIONS:
        return given
    ahead = next((i for i, word in enumerate(given) if word not in FLAGS), len(given))
    if 0 < ahead < len(given) and given[ahead] in commands():
        given = [given[ahead], *given[:ahead], *given[ahead + 1 :]]
    if given[0] not in commands():
        return ["convert", *given]
    if given[0] not in FIGURES:
        return given
    found = []
    for word, after in zip(given, [*given[1:], "--"], strict=True):
        bare = word == "--json" and after.startswith("-") and after != TO_PROGRAMS
        found += [word, TO_PROGRAMS] if bare else [word]
    return found


def misspelt(given: list[str]) -> str | None:
    """What to say of a first word that is no model but nearly a command's name."""
    first = given[0] if given else ""
    if first.startswith("-") or first in commands() or "/" in first or Path(first).exists():
        return None
    near = difflib.get_close_matches(first, sorted(commands()), 1, 0.75)
    if not near:
        return None
    return (
        f"zqfp-convert: {first}: no such command, and no such folder. Did you mean "
        f"`zqfp-convert {near[0]}`? A model of that name on the Hub is converted by "
        f"`zqfp-convert convert {first} OUT/`."
    )


def main() -> None:
    """Run the command line."""
    completion.prepare(arguments)
    given = sys.argv[1:]
    if told := misspelt(given):
        typer.echo(told, err=True)
        sys.exit(REFUSED)
    try:
        app(arguments(given), prog_name="zqfp-convert")
    except KeyboardInterrupt:
        typer.echo(STOPPED, err=True)
        sys.exit(INTERRUPTED)
