"""`zqfp-convert push OUT/ USER/NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from zqfp_convert.cli import console

if TYPE_CHECKING:
    from zqfp_convert.push.run import Pushed


def command(
    checkpoint: Annotated[str, typer.Argument(help="The folder of a packed checkpoint.")],
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
            help="Its licence, as the Hub spells it. \\[default: that of the original's card]",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what else the repository holds.")
    ] = False,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    debug: console.Debug = False,
) -> None:
    """Upload a checkpoint to the Hub, with a model card made of what it has on record.

    Interrupted, the same command sends what is missing. The token is that of HF_TOKEN or of
    hf auth login.
    """
    with console.errors(debug, as_json):
        from zqfp_convert.push.run import push

        with console.progress(quiet or as_json) as report:
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
        if as_json:
            console.print_json(done.to_json())
        elif not quiet:
            show(done)


def show(done: Pushed) -> None:
    """What a push did, in a few lines."""
    made = "made" if done.created else "there before"
    console.out.print(
        f"[bold]{escape(done.url)}[/] ({made}): {len(done.sent)} files sent, {len(done.there)} "
        "there already" + (f", {len(done.removed)} removed" if done.removed else ""),
        soft_wrap=True,
    )
    if done.left_out:
        console.out.print(
            f"not part of the checkpoint, not sent: {escape(', '.join(done.left_out))}"
        )
    if not done.pictured:
        console.out.print("The card has no picture: pip install 'zqfp-convert\\[report]' draws it.")
