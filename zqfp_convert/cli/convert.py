"""`zqfp-convert MODEL OUT/`."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from zqfp_convert.cli import console
from zqfp_convert.cli.push import show as show_pushed
from zqfp_convert.cli.screen import RARE, HelpAll, choices
from zqfp_convert.errors import OptionError, Stopped

if TYPE_CHECKING:
    from zqfp_convert.conversion import Conversion
    from zqfp_convert.conversion.probe import Estimate
    from zqfp_convert.plan import Plan

METHOD = f"{RARE}: the method"
TEXT = f"{RARE}: text"
OTHERS = f"{RARE}: the rest"

EXAMPLES = [
    ("zqfp-convert MODEL OUT/", ""),
    ("zqfp-convert MODEL OUT/ --calibration T.txt --dry-run", "the plan alone"),
    ("zqfp-convert MODEL OUT/ --recipe fast", "no calibration"),
]

SPELT = {  # choices of a recipe whose options have other names
    "activation_order": "act_order",
    "balance_norms": "balance",
    "center_norms": "offset",
    "low_rank_rounds": "alternations",
}


class Offset(Enum):
    """Of LayerNorm outputs."""

    mean = "mean"
    none = "none"


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a name on the Hub.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="[bold]best[/], [bold]max[/] (then tuned as a whole), [bold]fast[/] (not "
            "calibrated), [bold]paper[/] (ZeroQuant-FP).",
            autocompletion=choices("best", "max", "fast", "paper"),
        ),
    ] = "best",
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help=".txt, .jsonl, or a data set on the Hub. \\[default: the model writes its own]",
        ),
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="m2: row scale times powers of two; m1: powers of two; free. "
            "\\[default of best: m2]",
            autocompletion=choices("m2", "m1", "free"),
        ),
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="32, 64, 128, 256 or row. \\[default of best: 128]",
            autocompletion=choices("32", "64", "128", "256", "row"),
        ),
    ] = None,
    codebooks: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="pair (closer to the original), or e2m1 (plain FP4). \\[default of best: pair]",
            autocompletion=choices("pair", "e2m1"),
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Of the low-rank compensation; 0: none; auto. \\[default of best: 8]"
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Leave layers alone, such as 'down_proj' or 'layers.0.*'. Repeat for more. "
            "\\[default: lm_head]",
        ),
    ] = None,
    device: console.Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an earlier checkpoint (in OUT, on the Hub)."),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on with what is in OUT.partial, or throw it away.",
        ),
    ] = True,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Upload it when it is done, with a model card."),
    ] = None,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    log_file: console.LogFile = None,
    every: HelpAll = False,
    tune: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Steps of end-to-end tuning after all else; 0 for none.",
            rich_help_panel=METHOD,
            min=0,
        ),
    ] = None,
    rotation: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Of the residual stream, by a Hadamard matrix: auto (if a rehearsal is closer to "
            "the original with it), residual or none.",
            rich_help_panel=METHOD,
            autocompletion=choices("auto", "residual", "none"),
        ),
    ] = None,
    offset: Annotated[
        Offset | None,
        typer.Option(
            metavar="KIND",
            help="What is subtracted from the outputs of LayerNorms, so that FP8 has less to lose: "
            "each feature's mean (folded into biases), or none.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    balance: Annotated[
        bool | None,
        typer.Option(
            "--balance/--no-balance",
            help="Take back what the gains of norms and the weights behind them have moved "
            "between each other, where that is much.",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    act_order: Annotated[
        bool | None,
        typer.Option(
            "--act-order/--no-act-order",
            help="GPTQ in the order of the Hessian's diagonal.",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    asymmetry: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="From 0 to 1: how far a layer aims at the original model's outputs instead of "
            "those of its own quantized inputs.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    sweeps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of coordinate descent over the codes, after GPTQ.",
            rich_help_panel=METHOD,
            min=0,
        ),
    ] = None,
    alternations: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Times that the low-rank factors are fitted again and the codes with them.",
            rich_help_panel=METHOD,
            min=0,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many windows to calibrate on.", rich_help_panel=TEXT),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens in each.", rich_help_panel=TEXT)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of all that is random.", rich_help_panel=TEXT)
    ] = None,
    tune_samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Windows to tune on: more of the calibration text, and where it ends, text that "
            "the model writes.",
            rich_help_panel=TEXT,
            min=0,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of a model on the Hub.", rich_help_panel=OTHERS),
    ] = None,
    private: Annotated[
        bool,
        typer.Option(
            "--private",
            help="Push to a repository that others cannot see.",
            rich_help_panel=OTHERS,
        ),
    ] = False,
    debug: console.Debug = False,
) -> None:
    """Convert MODEL into a packed FP4 checkpoint in OUT (the word convert may be left out).

    Stopped by Ctrl-C or killed, the same command goes on where it was.
    """
    from zqfp_convert import parallel

    with (
        console.interface(debug, as_json=as_json, quiet=quiet, log_file=log_file) as ui,
        _spelled(),
        parallel.join(device) as world,
        ExitStack() as planning,
    ):
        from zqfp_convert.checkpoint.output.partial import partial_folder
        from zqfp_convert.checkpoint.source import hub
        from zqfp_convert.conversion import run
        from zqfp_convert.conversion.probe import estimate
        from zqfp_convert.plan import make_plan
        from zqfp_convert.push.run import check, push
        from zqfp_convert.recipe import Recipe

        if not world.leads:
            ui.follow()
        chosen = Recipe.named(
            recipe,
            scales=scales,
            group_size=_number(group_size),
            codebooks=codebooks,
            rank=_number(rank),
            low_rank_rounds=alternations,
            sweeps=sweeps,
            asymmetry=asymmetry,
            activation_order=act_order,
            rotation=rotation,
            balance_norms=balance,
            center_norms=None if offset is None else offset is Offset.mean,
            tune=tune,
            ignore=ignore,
            tune_samples=tune_samples,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
        )
        planned = partial(
            make_plan,
            out=out,
            recipe=chosen,
            calibration=calibration,
            device=world.device,
            overwrite=overwrite,
            revision=revision,
            world=world,
        )
        if dry_run:
            plan = planned(planning.enter_context(hub.to_plan(model, revision)))
        else:
            if world.leads and not hub.is_here(model, revision):
                with hub.to_plan(model, revision) as headers:
                    planned(headers)  # refuses what cannot be before all of it is downloaded
            plan = planned(model)
        if push_to_hub is not None and not dry_run:
            world.lead(lambda: check(push_to_hub, private=private, overwrite=overwrite))
        shown = not ui.silent or ui.log is not None
        time = estimate(plan) if world.leads and (dry_run or shown) else None
        _show_plan(ui, plan, time, every_layer=dry_run, resume=resume)
        if dry_run:
            seconds = {} if time is None else {"estimated_seconds": round(time.seconds, 1)}
            ui.give(plan.to_json() | seconds)
            return
        try:
            with ui.progress("weights") as report:
                result = run(plan, report, resume=resume, world=world)
        except Stopped as stopped:
            if world.size > 1:
                raise
            again = ["zqfp-convert", *(word for word in sys.argv[1:] if word != "--no-resume")]
            raise Stopped(f"{stopped} Go on with:\n  {shlex.join(again)}") from None
        except Exception:
            if (left := partial_folder(plan.out)).exists():
                ui.kept = f"What is done is kept in {left}: the same command goes on from there."
            raise
        _show_result(ui, result, time)
        found = result.to_json()
        if push_to_hub is not None and world.leads:
            with ui.progress("bytes") as report:
                pushed = push(
                    out, push_to_hub, private=private, overwrite=overwrite, progress=report
                )
            found["pushed"] = pushed.to_json()
            show_pushed(ui, pushed)
        ui.give(found)


@contextmanager
def _spelled() -> Iterator[None]:
    """Errors of arguments name the options here that these are given by."""
    try:
        yield
    except OptionError as error:
        if re.fullmatch(r"[a-z_]+", error.where) is None:
            raise
        option = "--" + SPELT.get(error.where, error.where).replace("_", "-")
        advice = re.sub(rf"(?<![-\w]){error.where}(?!\w)", option, error.do)
        raise OptionError(option, error.found, needed=error.needed, do=advice) from None


def _number(text: str | None) -> int | str | None:
    """The whole number that a text is; other texts are for the recipe to judge."""
    return int(text) if text is not None and text.isdigit() else text


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _show_plan(
    ui: console.Interface,
    plan: Plan,
    time: Estimate | None,
    *,
    every_layer: bool,
    resume: bool,
) -> None:
    from zqfp_convert.checkpoint.output.partial import partial_folder, room
    from zqfp_convert.plan.disk import journal_bytes

    recipe = plan.recipe
    layers = [layer for block in plan.layers for layer in block]
    most = "at most " if recipe.rank == "auto" else ""
    rows = {
        "model": f"{plan.model_name} ({type(plan.model).__name__})",
        "output": str(plan.out),
        "recipe": f"{recipe.name}: scales {recipe.scales}, group {recipe.group_size}, "
        f"rank {recipe.rank}",
        "layers": f"{len(layers)} linears in {len(plan.layers)} blocks, {most}{plan.bits:.2f} bits "
        "a weight",
        "size": f"{console.size(plan.bytes_before)} to {most}{console.size(plan.bytes_after)}",
        "calibration": plan.calibration
        + (f", {recipe.samples} x {recipe.seq_len} tokens" if recipe.needs_calibration else ""),
        "rotation": _rotation(plan),
        "tuning": plan.tuning,
        "device": str(plan.device),
        **(
            {"processes": f"{plan.processes}, {plan.host_processes} of them on this host"}
            if plan.processes > 1
            else {}
        ),
        "memory": f"about {console.size(plan.host_memory)} of host memory"
        + (f", {console.size(plan.device_memory)} on the GPU" if plan.device_memory else ""),
        "disk": f"{console.size(plan.bytes_after)} for the checkpoint, "
        f"{console.size(journal_bytes(plan))} beside it meanwhile, "
        f"{console.size(room(plan.out))} free",
        "left alone": _left_alone(plan),
    }
    if plan.states != "device":
        where = "host memory" if plan.states == "host" else "a file in OUT.partial"
        rows["states"] = f"of the calibration text are kept in {where}, for want of memory"
    if time is not None:
        rows["time"] = (
            f"about {_duration(time.seconds)}, an estimate from steps timed on {plan.device} "
            f"({time.took:.1f} s)"
        )
    unfinished = partial_folder(plan.out)
    if unfinished.exists():
        what = "gone on with if it is the same conversion" if resume else "thrown away"
        rows["unfinished"] = f"{unfinished}, {what}"
    if code := plan.source.code_files():
        rows["not run"] = "code of the model's author: " + ", ".join(map(str, code))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, escape(value))
    ui.print(table)
    if not every_layer:
        return
    title = "layer of a block", "N", "K", "how many", f"{most}bits a weight", f"{most}size"
    shapes = Table(*title, box=None)
    for (place, n, k), alike in plan.kinds().items():
        size = sum(layer.packed_bytes for layer in alike)
        bits = 8 * size / (n * k * len(alike))
        row = place, str(n), str(k), str(len(alike)), f"{bits:.3f}", console.size(size)
        shapes.add_row(*map(escape, row))
    ui.print(shapes)


def _rotation(plan: Plan) -> str:
    """Whether the residual stream will be rotated, as far as it is known."""
    from zqfp_convert.checkpoint.output.partial import room
    from zqfp_convert.plan.disk import output_bytes, untied_bytes

    if plan.recipe.rotation != "auto":
        return plan.recipe.rotation
    more = untied_bytes(plan)
    if more and room(plan.out) < output_bytes(plan) + more:
        return (
            "auto: none, as the disk has no room for the tied head as a tensor of its own "
            f"({console.size(more)} more)"
        )
    tied = f" (the tied head becomes a tensor of its own then, {console.size(more)} more)"
    return "auto: a rehearsal decides" + (tied if more else "")


def _left_alone(plan: Plan) -> str:
    """Which layers stay as they are, and why."""
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.left_alone.items():
        reasons.setdefault(reason, []).append(name)
    told = (f"{console.kinds(names)} ({reason})" for reason, names in reasons.items())
    return "; ".join(told) or "nothing"


def _estimated(result: Conversion, time: Estimate | None) -> Iterator[str]:
    """What it took, beside what the plan had estimated."""
    plan = result.plan
    if time is not None:
        yield f"{_duration(result.seconds)} (estimated: {_duration(time.seconds)})"
    for where, peak, planned in (
        ("host memory", result.host_peak, plan.host_memory),
        ("GPU memory", result.device_peak, plan.device_memory),
    ):
        if peak is not None:
            yield f"{console.size(peak)} of {where} (estimated: {console.size(planned)})"


def _show_result(ui: console.Interface, result: Conversion, time: Estimate | None) -> None:
    plan, layers = result.plan, result.layers
    ui.print(
        f"\n[bold]{escape(str(result.out))}[/]: {console.size(plan.bytes_before)} to "
        f"{console.size(result.bytes_after)}, {result.bits:.2f} bits a weight, "
        f"{result.seconds:.1f} s"
    )
    ui.print(f"took {', '.join(_estimated(result, time))}")
    if plan.rotation is not None:
        ui.print("residual stream rotated")
    if plan.recipe.rank == "auto":
        found = ", ".join(f"{rank} in {count}" for rank, count in result.ranks.items())
        ui.print(f"rank of the low-rank compensation: {found} of {len(layers)} layers")
    worst = Table(
        "least exact layers", "error of weights", "of outputs", "of FP8 activations", box=None
    )
    for name, entry in result.worst(3):
        output = entry["output_error"]
        shown = "not calibrated" if output is None else f"{output:.2%}"
        lost = f"{entry['activation_error']:.2%}" if "activation_error" in entry else "-"
        worst.add_row(escape(name), f"{entry['weight_error']:.2%}", shown, lost)
    ui.print(worst)
    used = result.calibration
    if used is not None:
        tokens = used["samples"] * used["seq_len"]
        ui.print(f"calibrated on {used['samples']} windows, {tokens:,} tokens")
        widest = max(layer.columns for block in plan.layers for layer in block)
        if tokens < widest:
            ui.print(
                f"[bold yellow]Few tokens:[/] the widest layer has {widest:,} inputs, so its "
                "statistics are poor; give more text."
            )
    covered = result.coverage
    if covered:
        ui.print(console.coverage_table(covered))
        if any(one.pooled for one in covered.values()):
            ui.print(
                "Pooled matrices have seen fewer tokens than they have columns, and were solved "
                "with the statistics of their block's experts together; more text may help."
            )
    if result.tuning is not None:
        tuning = result.tuning
        ui.print(
            f"tuned as a whole: KL to the original on text held back {tuning.kl_before:.4f} to "
            f"{tuning.kl_after:.4f} in {tuning.seconds / 60:.1f} minutes"
            + ("" if tuning.roundings else ", roundings left as they were")
            + ("" if tuning.kept else "; it is left as it was before")
        )
    retried = result.to_json()["damping_retries"]
    if retried:
        ui.print(f"More damping was needed for: {escape(', '.join(retried))}")
    path = escape(repr(str(result.out)))
    ui.print(f"\nLoad it:  import zqfp_convert; model = zqfp_convert.load({path})")
