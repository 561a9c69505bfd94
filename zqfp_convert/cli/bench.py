"""`zqfp-convert bench OUT/`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from zqfp_convert.cli import console

if TYPE_CHECKING:
    from zqfp_convert.bench.figures import Benchmark, Figures

HOST_BOUND = 0.9  # share of the time of decoding that the host took to ask for it


EXAMPLES = [
    ("zqfp-convert bench OUT/", ""),
    ("zqfp-convert bench OUT/ --context 1024 --no-baseline", ""),
]


def command(
    checkpoint: console.Checkpoint,
    prompt_tokens: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N,N",
            help="Lengths of prompts: 8192,1024. Repeat for more. \\[default: 8192,1024, as far as "
            "the model's positions go]",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens in the cache when decoding begins. \\[default: 1024, as far as the "
            "model's positions go]",
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(metavar="N", help="To decode.")] = 64,
    repeats: Annotated[
        int, typer.Option(metavar="N", help="Of each measurement; the median counts.")
    ] = 5,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline/--no-baseline",
            help="Measure the model in bfloat16 beside it, where there is room for both.",
        ),
    ] = True,
    original: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model that it was made from. \\[default: the one on record if it is there, "
            "else random weights of the same shapes]",
        ),
    ] = None,
    json_file: console.JsonFile = None,
    device: console.Device = None,
    quiet: console.Quiet = False,
    log_file: console.LogFile = None,
    debug: console.Debug = False,
) -> None:
    """Measure prefill and decoding in tokens a second, memory, and bytes read, beside bfloat16.

    Both models run in the same way, in turn, a batch of one: transformers with a static cache; on a
    GPU the steps are compiled, and decoding runs as a CUDA graph.
    """
    as_json = json_file == console.TO_PROGRAMS
    with console.interface(debug, as_json=as_json, quiet=quiet, log_file=log_file) as ui:
        from zqfp_convert.bench.run import bench

        target = console.json_target(json_file)
        with ui.progress() as report:
            result = bench(
                checkpoint,
                prompts=console.numbers("prompt-tokens", prompt_tokens),
                context=context,
                new_tokens=new_tokens,
                repeats=repeats,
                baseline=baseline,
                original=original,
                device=device,
                progress=report,
            )
        console.give_json(result.to_json(), json_file, target)
        show(ui, result)


def show(ui: console.Interface, result: Benchmark) -> None:
    """The tables of a benchmark."""
    work = result.workload
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    ui.print(escape(f"{result.device}; {versions}"))
    models = [m for m in (result.packed, result.bf16) if m is not None]
    names = ["packed", "bf16"][: len(models)]
    table = Table("", *names, *(["ratio"] if result.bf16 else []), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    ratios = result.ratios() or {}

    def row(title: str, cells: list[str], ratio: float | None) -> None:
        shown = [f"{ratio:.2f}" if ratio is not None else ""] if result.bf16 else []
        table.add_row(title, *cells, *shown)

    for length in work.prompts:
        row(
            f"prefill of {length} tokens, tokens/s",
            [f"{m.prefill[length]:,.1f}" for m in models],
            ratios["prefill"][length] if ratios else None,
        )
    row(
        f"decode after {work.context}, tokens/s",
        [f"{m.decode:,.1f}" for m in models],
        ratios.get("decode"),
    )
    row(
        "weights",
        [console.size(m.weight_bytes) for m in models],
        ratios.get("weight_bytes"),
    )
    if result.packed.held_bytes is not None:
        row(
            "GPU memory when loaded",
            [console.size(m.held_bytes or 0) for m in models],
            ratios.get("held_bytes"),
        )
    row(
        "read for a decoded token",
        [console.size(m.read_bytes) for m in models],
        ratios.get("read_bytes"),
    )
    row("share of read bandwidth", [f"{result.share(m):.1%}" for m in models], None)
    ui.print(table)
    ui.print(_reads(names, models))
    ui.print(f"read bandwidth measured: {result.bandwidth / 1e12:.3f} TB/s")
    if result.original is not None:
        ui.print(f"bf16 model: {escape(result.original)}", soft_wrap=True)
    for name, figures in zip(names, models, strict=True):
        if figures.compiled and figures.queued > HOST_BOUND:
            ui.print(f"{name}: decoding waited for the host, not for the GPU")
    for note in result.notes:
        ui.print(f"[bold yellow]Note:[/] {escape(note)}", soft_wrap=True)


def _reads(names: list[str], models: list[Figures]) -> Table:
    table = Table("of which", *names, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for kind in models[0].read:
        if any(m.read[kind] for m in models):
            table.add_row(kind, *(console.size(m.read[kind]) for m in models))
    return table
