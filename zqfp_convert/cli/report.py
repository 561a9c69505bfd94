"""`zqfp-convert report OUT/`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from zqfp_convert.cli import console

EXAMPLES = [
    ("zqfp-convert report OUT/", ""),
    ("zqfp-convert report OUT/ --evaluation figures.json", "with KL and perplexity"),
]


def command(
    checkpoint: console.Checkpoint,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What evaluate --json wrote of it. \\[default: what an earlier report has kept]",
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where to write. \\[default: the checkpoint's folder, or this one for a name on "
            "the Hub]",
        ),
    ] = None,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    log_file: console.LogFile = None,
    debug: console.Debug = False,
) -> None:
    """Write a page and a picture: size, errors, spans, KL, what limited it and what to try.

    report.html needs nothing beside it; report.png, which takes matplotlib, is for a model card.
    """
    with console.interface(debug, as_json=as_json, quiet=quiet, log_file=log_file) as ui:
        from zqfp_convert.report.run import report

        made = report(checkpoint, evaluation=evaluation, to=to)
        found = [
            {"title": each.title, "text": each.text, "try": each.attempt} for each in made.findings
        ]
        drawn = None if made.picture is None else str(made.picture)
        ui.give({"page": str(made.page), "picture": drawn, "findings": found})
        for each in made.findings:
            ui.print(f"[bold]{escape(each.title)}[/]: {escape(each.text)}")
            if each.attempt:
                ui.print(f"  try {escape(each.attempt)}")
        written = str(made.page) if drawn is None else f"{made.page}, {drawn}"
        ui.print(f"\nwritten: {written}", soft_wrap=True, markup=False)
        if drawn is None:
            ui.print("no picture: pip install 'zqfp-convert\\[report]' brings what draws it")
