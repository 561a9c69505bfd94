"""`zqfp-convert compare MODEL --preset zeroquant-fp`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from zqfp_convert.cli import console
from zqfp_convert.cli.screen import choices

if TYPE_CHECKING:
    from zqfp_convert.compare.configuration import Configuration
    from zqfp_convert.compare.plan import StudyPlan
    from zqfp_convert.compare.study import Row, Study

PRESET = "zeroquant-fp"


EXAMPLES = [
    ("zqfp-convert compare MODEL", ""),
    ("zqfp-convert compare MODEL --preset mx --text T.txt --plot kl.svg", ""),
]


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a name on the Hub.")],
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=choices("zeroquant-fp", "fp8-formats", "zeroquant-v2", "mx"),
            help="Whose table: zeroquant-fp, fp8-formats, zeroquant-v2 or mx. \\[default: "
            "zeroquant-fp, unless configurations are given]",
        ),
    ] = None,
    configuration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROW",
            help="One row, such as weights=e2m1,activations=e4m3,scales=m2,solver=gptq,rank=8. "
            "Repeat for more.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A .txt or .jsonl file to measure on, repeatable. \\[default: self-written]",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Other text, for GPTQ, SmoothQuant and static scales. \\[default: self-written]",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Calibration windows.")] = 16,
    seq_len: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens in each. \\[default: 1024, or the most it takes]"),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Which calibration windows.")] = 0,
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
            help="Tokens of text that see each other. \\[default: 2048, or the most it takes]",
        ),
    ] = None,
    group_size: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Weights that share a scale, in presets; 0: a whole row."
        ),
    ] = 256,
    rank: Annotated[int, typer.Option(metavar="N", min=1, help="Of LoRC, in presets.")] = 8,
    device: console.Device = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw it: .png, .svg or .pdf (extra \\[report])."),
    ] = None,
    json_file: console.JsonFile = None,
    quiet: console.Quiet = False,
    log_file: console.LogFile = None,
    debug: console.Debug = False,
) -> None:
    """Compare number formats, scales and solvers on a model, by simulation; writes no model."""
    as_json = json_file == console.TO_PROGRAMS
    with console.interface(debug, as_json=as_json, quiet=quiet, log_file=log_file) as ui:
        from zqfp_convert.compare import plot as plotting
        from zqfp_convert.compare.plan import make_plan
        from zqfp_convert.compare.study import run

        target = console.json_target(json_file)
        if plot is not None:
            plotting.check(plot)
        plan = make_plan(
            model,
            _configurations(preset, configuration or [], group_size, rank),
            text or [],
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            tokens=tokens,
            window=window,
            device=device,
        )
        _show_plan(ui, plan)
        with ui.progress("blocks") as report:
            result = run(plan, report)
        console.give_json(result.to_json(), json_file, target)
        if plot is not None:
            plotting.draw(result, plot)
        _show_result(ui, result)


def _configurations(
    preset: str | None, given: list[str], group_size: int, rank: int
) -> list[Configuration]:
    from zqfp_convert.compare import presets
    from zqfp_convert.compare.configuration import Configuration

    own = [Configuration.parse(text) for text in given]
    if own and preset is None:
        return [presets.ORIGINAL, *own]
    return [*presets.preset(preset or PRESET, group_size, rank), *own]


def _show_plan(ui: console.Interface, plan: StudyPlan) -> None:
    from zqfp_convert.compare.plan import WRITTEN

    count = sum(len(text.ids) for text in plan.texts) or WRITTEN
    measured = ", ".join(text.name for text in plan.texts) or "text that the model writes"
    calibrated = "text that the model writes" if plan.calibration is None else plan.calibration.name
    rows = {
        "model": f"{plan.parts.source.folder} (runs in {plan.parts.dtype})".replace("torch.", ""),
        "text": f"{count} windows of {plan.window} tokens, without overlap, of {measured}",
        "calibration": f"{plan.samples} windows of {plan.seq_len} tokens of {calibrated}"
        if plan.calibrates
        else "none needed",
        "compared": f"{len(plan.configurations)} configurations, on {plan.device}",
        "memory": f"about {console.size(plan.host_memory)} of host memory"
        + (f", {console.size(plan.device_memory)} on the GPU" if plan.device_memory else ""),
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, escape(value))
    ui.print(table)


def _show_result(ui: console.Interface, result: Study) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("", "weights", "activations", "solver"):
        table.add_column(heading, overflow="fold")
    table.add_column("bits", justify="right")
    for text in result.texts:
        name = f"{escape(text.name)}\n" if len(result.texts) > 1 else ""
        table.add_column(f"{name}perplexity", justify="right")
        table.add_column("mean KL", justify="right")
    table.add_column("seconds", justify="right")
    section = None
    for row in result.rows:
        if row.configuration.section != section:
            section = row.configuration.section
            table.add_row(f"[bold]{escape(section)}[/]")
        table.add_row(*_cells(row))
    ui.print()
    ui.print(table)
    names = ", ".join(text.name for text in result.texts)
    ui.print(
        f"\nmeasured on {escape(names)}; KL of original to quantized in nats a token, ± the 95 % "
        f"interval over windows; {result.seconds:.1f} s"
    )


def _cells(row: Row) -> list[str]:
    from zqfp_convert.compare.formats import FORMATS, NONE

    made = row.configuration
    weights, activations, solver = made.weights, made.activations, "-"
    if weights != NONE:
        if FORMATS[weights].block is None:
            weights += f", {made.group_size or 'row'}"
        if made.scales != "free":
            weights += f", {made.scales} {made.scale_rounding}"
        solver = made.solver + (f", LoRC {made.rank}" if made.rank else "")
    if made.smooth:
        solver += f", smooth {made.smooth:g}"
    if activations != NONE and FORMATS[activations].block is None:
        activations += f", {made.activation_scale}"
    cells = [f"  {escape(made.label)}", weights, activations, solver, f"{row.bits:.2f}"]
    for figures in row.figures:
        half = "" if figures.kl.half is None else f" ± {figures.kl.half:.4f}"
        cells += [f"{figures.perplexity:.3f}", f"{figures.kl.mean:.4f}{half}"]
    return [*cells, f"{row.seconds:.1f}" if row.seconds else ""]
