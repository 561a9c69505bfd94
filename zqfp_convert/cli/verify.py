"""`zqfp-convert verify OUT/`."""

from __future__ import annotations

from typing import Annotated

import typer

from zqfp_convert.cli import console


def command(
    checkpoint: Annotated[str, typer.Argument(help="A packed checkpoint, or a name on the Hub.")],
    against: Annotated[
        str | None, typer.Option(help="The model that it was made from, to compare with.")
    ] = None,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    debug: console.Debug = False,
) -> None:
    """Prove a checkpoint: hashes, the format's rules, an exact cast to FP8 for every group."""
    with console.errors(debug, as_json):
        from zqfp_convert.verify import verify

        with console.progress(quiet or as_json) as report:
            proved = verify(checkpoint, against, report)
        if as_json:
            console.print_json(proved.to_json())
        elif not quiet:
            console.out.print(
                f"Whole: every file has its hash, and {proved.layers} layers with "
                f"{proved.groups:,} groups keep every rule of the format."
            )
            console.out.print(
                "Exact: every FP4 weight times its shift is the FP8 number it should be."
                if proved.exact
                else "Free scales: this checkpoint has no exact cast to FP8 to prove."
            )
            if proved.errors:
                mean = sum(proved.errors.values()) / len(proved.errors)
                worst = max(proved.errors, key=lambda name: proved.errors[name])
                console.out.print(
                    f"Against the model: weight errors as written down, {mean:.2%} on average, "
                    f"{proved.errors[worst]:.2%} in {worst}; {proved.unchanged} other tensors "
                    "unchanged."
                )
