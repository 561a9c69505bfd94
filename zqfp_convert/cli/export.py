"""`zqfp-convert export OUT/ DEST/`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from zqfp_convert.cli import console
from zqfp_convert.cli.screen import choices

EXAMPLES = [
    ("zqfp-convert export OUT/ DEST/ --to bf16", "any program"),
    ("zqfp-convert export OUT/ DEST/ --to compressed-tensors", ""),
    ("zqfp-convert export OUT/ DEST/ --to gguf", ""),
]


def command(
    checkpoint: console.Checkpoint,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="The folder to make.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            autocompletion=choices("compressed-tensors", "bf16", "gguf"),
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
    log_file: console.LogFile = None,
    debug: console.Debug = False,
) -> None:
    """Write a packed checkpoint in the format of other programs.

    compressed-tensors and gguf keep every weight as it is, or refuse: convert with
    [bold]--scales m1 --codebooks e2m1[/] for them. bf16 takes any checkpoint.
    """
    with console.interface(debug, as_json=as_json, quiet=quiet, log_file=log_file) as ui:
        from zqfp_convert.exporting import export

        with ui.progress("tensors") as report:
            made = export(checkpoint, dest, to, resume=resume, progress=report)
        ui.give(made.to_json())
        if not as_json or ui.log:
            ui.print(
                f"Exported {made.layers} layers to {escape(str(made.dest))} ({made.to}), "
                f"{console.size(made.bytes)}."
            )
            if made.adapter is not None:
                ui.print(
                    "The low-rank compensation is a LoRA adapter, which has to be loaded too: "
                    f"{escape(str(made.adapter))}"
                )
            for layers, span in made.wide.items():
                ui.print(
                    f"{escape(layers)}: span {span}. Above 11, vLLM's kernel for Hopper quantizes "
                    "the smallest groups of what it multiplies at once again."
                )
