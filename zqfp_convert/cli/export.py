"""`zqfp-convert export OUT/ DEST/`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from zqfp_convert.cli import console


def command(
    checkpoint: Annotated[str, typer.Argument(help="A packed checkpoint, or a name on the Hub.")],
    dest: Annotated[Path, typer.Argument(help="The folder to make.")],
    to: Annotated[
        str,
        typer.Option(
            help="[bold]compressed-tensors[/]: MXFP4 with FP8 activations, for transformers and "
            "vLLM; [bold]bf16[/]: dequantized, for any program; [bold]gguf[/]: MXFP4, for "
            "llama.cpp.",
        ),
    ],
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on from what a run that was stopped has left, or throw it away.",
        ),
    ] = True,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    debug: console.Debug = False,
) -> None:
    """Write a packed checkpoint in the format of other programs.

    compressed-tensors and gguf keep every weight as it is, or refuse: convert with
    [bold]--scales m1 --codebooks e2m1[/] for them. bf16 takes any checkpoint.
    """
    with console.errors(debug, as_json):
        from zqfp_convert.exporting import export

        with console.progress(quiet or as_json) as report:
            made = export(checkpoint, dest, to, resume=resume, progress=report)
        if as_json:
            console.print_json(made.to_json())
        elif not quiet:
            console.out.print(
                f"Exported {made.layers} layers to {escape(str(made.dest))} ({made.to}), "
                f"{console.size(made.bytes)}."
            )
            if made.adapter is not None:
                console.out.print(
                    "The low-rank compensation is a LoRA adapter, which has to be loaded too: "
                    f"{escape(str(made.adapter))}"
                )
            for layers, span in made.wide.items():
                console.out.print(
                    f"{escape(layers)}: span {span}. Above 11, vLLM's kernel for Hopper quantizes "
                    "the smallest groups of what it multiplies at once again."
                )
