"""`zqfp-convert push OUT/ USER/NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from zqfp_convert.cli import console

if TYPE_CHECKING:
    from zqfp_convert.push.run import Pushed


EXAMPLES = [
    ("zqfp-convert push OUT/ USER/NAME", ""),
    ("zqfp-convert push OUT/ USER/NAME --private", ""),
    ("HF_TOKEN=… zqfp-convert push OUT/ USER/NAME", "a token for this once"),
]

UNNAMED = {
    "base_model": "original, which --base-model USER/NAME does",
    "license": "licence, which --license NAME does",
}


def command(
    checkpoint: Annotated[
        str, typer.Argument(metavar="OUT", help="The folder of a packed checkpoint.")
    ],
    repository: Annotated[
        str, typer.Argument(metavar="USER/NAME", help="The repository; made if there is none.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make it one that others cannot see.")
    ] = False,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What evaluate --json wrote, for the card. \\[default: what a report has kept]",
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="USER/NAME",
            help="The original's repository. \\[default: the one on record]",
        ),
    ] = None,
    license_name: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="NAME",
            help="Its licence, as the Hub spells it. \\[default: that of the original's card]",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what else the repository holds.")
    ] = False,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    log_file: console.LogFile = None,
    debug: console.Debug = False,
) -> None:
    """Upload a checkpoint to the Hub, with a model card made of what it has on record.

    Interrupted, the same command sends what is missing. The token is that of HF_TOKEN or of
    hf auth login.
    """
    with console.interface(debug, as_json=as_json, quiet=quiet, log_file=log_file) as ui:
        from zqfp_convert.push.run import push

        with ui.progress("bytes") as report:
            done = push(
                checkpoint,
                repository,
                private=private,
                overwrite=overwrite,
                evaluation=evaluation,
                base_model=base_model,
                license_name=license_name,
                progress=report,
            )
        ui.give(done.to_json())
        show(ui, done)


def show(ui: console.Interface, done: Pushed) -> None:
    """What a push did, in a few lines."""
    made = "made" if done.created else "there before"
    ui.print(
        f"[bold]{escape(done.url)}[/] ({made}): {len(done.sent)} files sent, {len(done.there)} "
        "there already" + (f", {len(done.removed)} removed" if done.removed else ""),
        soft_wrap=True,
    )
    if done.left_out:
        ui.print(f"not part of the checkpoint, not sent: {escape(', '.join(done.left_out))}")
    for key in done.unnamed:
        ui.print(f"The card names no {UNNAMED[key]}.")
    if not done.pictured:
        ui.print("The card has no picture: pip install 'zqfp-convert\\[report]' draws it.")
