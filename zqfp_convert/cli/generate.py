"""`zqfp-convert generate OUT/ "prompt"`."""

from __future__ import annotations

from typing import Annotated

import typer

from zqfp_convert.cli import console


def command(
    checkpoint: Annotated[str, typer.Argument(help="A packed checkpoint, or a name on the Hub.")],
    prompt: Annotated[str, typer.Argument(help="What the text begins with.")],
    tokens: Annotated[int, typer.Option(min=1, help="How many to write at most.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 … \\[default: the first GPU]")
    ] = None,
    debug: console.Debug = False,
) -> None:
    """Write text with a packed model, after a prompt."""
    with console.errors(debug):
        from zqfp_convert.generate import generate

        for piece in generate(
            checkpoint, prompt, tokens=tokens, temperature=temperature, seed=seed, device=device
        ):
            typer.echo(piece, nl=False)
        typer.echo()
