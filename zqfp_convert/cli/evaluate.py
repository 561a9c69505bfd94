"""`zqfp-convert evaluate OUT/ --against MODEL --text FILE`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from zqfp_convert.cli import console
from zqfp_convert.cli.screen import choices

if TYPE_CHECKING:
    from zqfp_convert.evaluate.evaluation import Evaluation, Measured
    from zqfp_convert.evaluate.figures import Figures
    from zqfp_convert.evaluate.interval import Interval
    from zqfp_convert.evaluate.plan import EvaluationPlan

FIGURES = (
    "perplexity",
    "original",
    "log-loss added",
    "mean KL",
    "median KL",
    "99 % of KL",
    "99.9 %",
    "same top",
)


EXAMPLES = [
    ("zqfp-convert evaluate OUT/ --against MODEL --text T.txt", ""),
    ("zqfp-convert evaluate OUT/ --against MODEL --text T.txt --json F", ""),
]


def command(
    checkpoint: console.Checkpoint,
    against: Annotated[str, typer.Option(metavar="MODEL", help="The model that it was made from.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A .txt or .jsonl file to measure on, not calibrated on. Repeat for more.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=2, help="How many to take of each text at most. \\[default: all]"
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens that see each other. \\[default: 2048, or the most the model takes]",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Windows that go through a block together."),
    ] = None,
    device: console.Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=choices("float32", "bfloat16", "float16", "stored"),
            help="Of the original: float32, bfloat16, float16 or stored. \\[default: float32 on "
            "the CPU, else as stored]",
        ),
    ] = None,
    json_file: console.JsonFile = None,
    quiet: console.Quiet = False,
    log_file: console.LogFile = None,
    debug: console.Debug = False,
) -> None:
    """Measure how close a checkpoint is to its model: perplexity, KL divergence, top tokens."""
    as_json = json_file == console.TO_PROGRAMS
    with console.interface(debug, as_json=as_json, quiet=quiet, log_file=log_file) as ui:
        from zqfp_convert.evaluate.evaluation import run
        from zqfp_convert.evaluate.plan import make_plan

        target = console.json_target(json_file)
        plan = make_plan(
            checkpoint,
            against,
            text or [],
            tokens=tokens,
            window=window,
            batch=batch,
            device=device,
            dtype=dtype,
        )
        _show_plan(ui, plan)
        with ui.progress("blocks") as report:
            result = run(plan, report)
        console.give_json(result.to_json(), json_file, target)
        _show_result(ui, result)


def _show_plan(ui: console.Interface, plan: EvaluationPlan) -> None:
    def kind(dtype: object) -> str:
        return str(dtype).removeprefix("torch.")

    rows = {
        "checkpoint": f"{plan.packed.checkpoint.folder} (runs in {kind(plan.packed.dtype)})",
        "against": f"{plan.original.source.folder} (runs in {kind(plan.original.dtype)})",
        "text": f"{plan.windows} windows of {plan.window} tokens, without overlap, of "
        + ", ".join(text.name for text in plan.texts),
        "device": str(plan.device),
        "memory": f"about {console.size(plan.host_memory)} of host memory "
        f"({console.size(plan.hidden_memory)} for hidden states)"
        + (f", {console.size(plan.device_memory)} on the GPU" if plan.device_memory else ""),
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, escape(value))
    ui.print(table)
    for name in plan.seen_in_calibration:
        ui.print(
            f"[bold yellow]Calibrated on:[/] the checkpoint names {escape(name)} as the text it "
            "was calibrated on; on it, it looks closer than it is."
        )


def _show_result(ui: console.Interface, result: Evaluation) -> None:
    texts = _table("text", "windows", "tokens", *FIGURES)
    for measured in result.texts:
        figures = measured.figures
        count = str(measured.windows), f"{figures.tokens:,}"
        texts.add_row(escape(measured.name), *count, *_cells(figures))
    ui.print()
    ui.print(texts)
    for measured in result.texts:
        ui.print()
        ui.print(_by_position(measured))
    ui.print(
        f"\nKL of original to quantized and log-loss in nats a token, ± the 95 % interval over "
        f"windows; {result.seconds:.1f} s"
    )


def _by_position(measured: Measured) -> Table:
    table = _table("tokens before", "tokens", *FIGURES)
    table.title, table.title_justify = escape(measured.name) + ", by position in the window", "left"
    for bucket in measured.positions:
        span = f"{bucket.first}" if bucket.first == bucket.last else f"{bucket.first}-{bucket.last}"
        table.add_row(span, f"{bucket.figures.tokens:,}", *_cells(bucket.figures))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _cells(figures: Figures) -> list[str]:
    return [
        f"{figures.perplexity:.3f}",
        f"{figures.original_perplexity:.3f}",
        _with_interval(figures.loss_difference),
        _with_interval(figures.kl),
        f"{figures.kl_median:.4f}",
        f"{figures.kl_99:.3f}",
        f"{figures.kl_999:.3f}",
        f"{figures.same_top:.2%}",
    ]


def _with_interval(interval: Interval) -> str:
    half = "" if interval.half is None else f" ± {interval.half:.4f}"
    return f"{interval.mean:.4f}{half}"
