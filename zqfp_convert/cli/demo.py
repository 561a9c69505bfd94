"""`zqfp-convert demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from zqfp_convert.cli import console

EXAMPLES = [
    ("zqfp-convert demo", ""),
    ("zqfp-convert demo KEPT/", "keep what it makes"),
]


def command(
    keep: Annotated[
        Path | None,
        typer.Argument(metavar="[FOLDER]", help="A new folder to keep the checkpoints in."),
    ] = None,
    as_json: console.Json = False,
    debug: console.Debug = False,
) -> None:
    """Convert the small model that the package carries, and show what it is worth."""
    with console.interface(debug, as_json=as_json) as ui:
        from zqfp_convert.demo.run import demo

        began = time.monotonic()
        with demo(keep) as shown:
            results = []
            for recipe in ("fast", "paper", "best"):
                ui.print(f"converting with recipe [bold]{recipe}[/] …")
                with ui.progress("weights") as report:
                    results.append(shown.measure(recipe, report))
            if as_json:
                ui.give(
                    {
                        r.recipe: {
                            "bits": r.conversion.bits,
                            "kl": r.divergence.kl,
                            "perplexity": r.divergence.perplexity,
                            "original_perplexity": r.divergence.original_perplexity,
                            "seconds": r.conversion.seconds,
                        }
                        for r in results
                    }
                )
                return
            original = results[0]
            table = Table(
                "", "weights on disk", "bits a weight", "perplexity", "KL to the original",
                "same top token", "seconds", box=None,
            )  # fmt: skip
            before = console.size(original.conversion.plan.bytes_before)
            perplexity = f"{original.divergence.original_perplexity:.3f}"
            table.add_row("original", before, "16", perplexity, "0", "100 %", "")
            for r in results:
                table.add_row(
                    r.recipe,
                    console.size(r.conversion.bytes_after),
                    f"{r.conversion.bits:.2f}",
                    f"{r.divergence.perplexity:.3f}",
                    f"{r.divergence.kl:.4f}",
                    f"{r.divergence.same_top:.1%}",
                    f"{r.conversion.seconds:.1f}",
                )
            ui.print()
            ui.print(table)
            tokens = original.divergence.tokens
            ui.print(
                f"measured on {tokens:,} tokens that the original wrote, none of them calibrated "
                "on\n"
            )
            ui.print("[bold]best[/], at work:")
            for line in shown.lines(results[-1].conversion.out):
                ui.print(f"  {escape(line)}")
            if keep is not None:
                ui.print(f"\nkept in {escape(str(keep))}")
            ui.print(f"\n{time.monotonic() - began:.0f} seconds in all")
