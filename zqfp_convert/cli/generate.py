"""`zqfp-convert generate OUT/ "prompt"`."""

from __future__ import annotations

from typing import Annotated

import typer

from zqfp_convert.cli import console

EXAMPLES = [
    ('zqfp-convert generate OUT/ "Once upon a time"', ""),
    ('zqfp-convert generate OUT/ "2 + 2 =" --temperature 0', ""),
]


def command(
    checkpoint: console.Checkpoint,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the text begins with.")],
    tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many to write at most.")
    ] = 100,
    temperature: Annotated[
        float, typer.Option(metavar="X", min=0.0, help="0 always takes the likeliest token.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the sampling.")] = 0,
    device: console.Device = None,
    as_json: console.Json = False,
    debug: console.Debug = False,
) -> None:
    """Write text with a packed model, after a prompt."""
    with console.interface(debug, as_json=as_json) as ui:
        from zqfp_convert.generate import generate

        pieces = generate(
            checkpoint, prompt, tokens=tokens, temperature=temperature, seed=seed, device=device
        )
        if as_json:
            ui.give({"prompt": prompt, "text": "".join(pieces)})
            return
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()
