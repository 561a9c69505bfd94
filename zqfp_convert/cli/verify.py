"""`zqfp-convert verify OUT/`."""

from __future__ import annotations

from typing import Annotated

import typer

from zqfp_convert.cli import console

EXAMPLES = [
    ("zqfp-convert verify OUT/", ""),
    ("zqfp-convert verify OUT/ --against MODEL", "errors of the weights too"),
]


def command(
    checkpoint: console.Checkpoint,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model that it was made from, to compare with."),
    ] = None,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    log_file: console.LogFile = None,
    debug: console.Debug = False,
) -> None:
    """Prove a checkpoint: hashes, the format's rules, an exact cast to FP8 for every group."""
    with console.interface(debug, as_json=as_json, quiet=quiet, log_file=log_file) as ui:
        from zqfp_convert.verify import verify

        with ui.progress("layers") as report:
            proved = verify(checkpoint, against, report)
        ui.give(proved.to_json())
        if not as_json or ui.log:
            ui.print(
                f"Whole: every file has its hash, and {proved.layers} layers with "
                f"{proved.groups:,} groups keep every rule of the format."
            )
            ui.print(
                "Exact: every FP4 weight times its shift is the FP8 number it should be."
                if proved.exact
                else "Free scales: this checkpoint has no exact cast to FP8 to prove."
            )
            if proved.errors:
                mean = sum(proved.errors.values()) / len(proved.errors)
                worst = max(proved.errors, key=lambda name: proved.errors[name])
                ui.print(
                    f"Against the model: weight errors as written down, {mean:.2%} on average, "
                    f"{proved.errors[worst]:.2%} in {worst}; {proved.unchanged} other tensors "
                    "unchanged."
                )
