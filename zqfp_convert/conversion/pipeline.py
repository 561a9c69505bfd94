"""Converts a model: block by block from source shards to a packed checkpoint.

This is the road of the data; the method itself is `quantize/weight.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
import transformers
from torch import Tensor

from zqfp_convert import __version__
from zqfp_convert.checkpoint import card, layout
from zqfp_convert.checkpoint.output.partial import Partial, differences, partial_folder
from zqfp_convert.checkpoint.output.series import Series
from zqfp_convert.checkpoint.output.writer import Writer
from zqfp_convert.checkpoint.source.origin import origin, without_own_path
from zqfp_convert.checkpoint.source.source import fingerprint
from zqfp_convert.conversion.host import Peak, given_back
from zqfp_convert.conversion.identity import identity
from zqfp_convert.conversion.layers import Layers
from zqfp_convert.conversion.result import Conversion, Progress
from zqfp_convert.conversion.tuning import Tuned, tune
from zqfp_convert.conversion.warm import warm
from zqfp_convert.conversion.work import Work
from zqfp_convert.distill.train import Outcome
from zqfp_convert.errors import SourceError, Stopped
from zqfp_convert.model import skeleton
from zqfp_convert.model.device import describe, reproducible
from zqfp_convert.numerics import codebook
from zqfp_convert.parallel import ALONE, World, lacking
from zqfp_convert.plan import Plan, blocks_waiting, make_plan
from zqfp_convert.recipe import Recipe

ON_CPU = "can't allocate memory"  # torch's words for it


def convert(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Recipe = "best",
    calibration: str | Path | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    resume: bool = True,
    revision: str | None = None,
    progress: Progress | None = None,
    world: World = ALONE,
    **choices: Any,
) -> Conversion:
    """Convert a Hugging Face causal language model into a packed FP4 checkpoint.

    A run that was killed, interrupted or out of room goes on after its last whole block when it is
    started again in the same way, and makes the same bytes as if it had never stopped.

    Args:
        model: a folder, or a repository on the Hub.
        out: the folder to make.
        recipe: a name (`fast`, `paper`, `best`, `max`) or a whole recipe.
        calibration: a .txt or .jsonl file, or a data set on the Hub; by default the model writes
            its own text.
        device: where to compute; the first GPU when there is one.
        overwrite: replace `out` if it is a checkpoint of ours.
        resume: go on with what an earlier run into `out` has left; else throw that away.
        revision: of a repository on the Hub.
        progress: called as work goes on; of several processes in the first alone.
        world: processes that all call this, with the same arguments; see `parallel.join`.
        choices: fields of `Recipe` to set, such as `group_size=64`.

    Raises:
        ZqfpError: with what stands in the way; `out` has not been made, or is what it was before.
        ProcessError: another process has failed; what is done can be gone on with.
        Stopped: (a KeyboardInterrupt) by Ctrl-C, with work done that can be gone on with.
    """
    named = recipe if isinstance(recipe, Recipe) else Recipe.named(recipe)
    plan = make_plan(
        model,
        out,
        recipe=named.changed(**choices),
        calibration=calibration,
        device=world.device if device is None else device,
        overwrite=overwrite,
        revision=revision,
        world=world,
    )
    return run(plan, progress, resume=resume, world=world)


def run(
    plan: Plan, progress: Progress | None = None, *, resume: bool = True, world: World = ALONE
) -> Conversion:
    """Carry out a plan, once. Raises what `convert` raises."""
    try:
        conversion = identity(plan, world.size)
        _check_same(conversion, world)
        overwrite, silent = plan.overwrite, progress is None or not world.leads
        with Partial(
            plan.out, conversion, overwrite=overwrite, resume=resume, world=world
        ) as partial:
            threads = partial.decided("threads", torch.get_num_threads())
            with reproducible(threads), given_back():
                report = (lambda text, done, total: None) if silent else progress
                assert report is not None
                with lacking(), _current(plan.device):
                    return _run(plan, partial, report)
    except KeyboardInterrupt:
        if partial_folder(plan.out).exists():
            raise Stopped(
                f"Stopped. What is done is in {partial_folder(plan.out)}; the same conversion "
                "goes on from there."
            ) from None
        raise
    except torch.OutOfMemoryError as error:
        raise SourceError(
            f"memory of {plan.device}",
            _lack(error),
            needed=f"about {(plan.device_memory or plan.host_memory) / 1e6:,.0f} MB, by the "
            "plan's estimate",
            do="Free some, and give the same command again: it goes on where it stopped. Or add "
            "--no-resume and use fewer --samples, a shorter --seq-len, or another --device.",
        ) from error
    finally:
        skeleton.empty(plan.model)


def _lack(error: torch.OutOfMemoryError) -> str:
    """What torch says was asked for, without where in its lines."""
    text = str(error)
    if ON_CPU in text:
        return text[text.index(ON_CPU) :].split(". ")[0]
    return text.split(".")[0]


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the one that libraries take without being told."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@torch.no_grad()
def _run(plan: Plan, partial: Partial, report: Progress) -> Conversion:
    began, world, peak = time.monotonic(), partial.world, Peak(plan.device)
    settled = warm(plan)
    roundings = partial.decided("roundings", plan.tunes_roundings)  # depends on free memory
    layers = Layers(replace(plan, tunes_roundings=roundings), report, world)
    work = Work(layers, partial, settled)
    with _weights_checked(plan, partial, report):
        calibration = work.calibrate() if plan.recipe.needs_calibration else None
    plan = work.plan  # of the rotated model, maybe
    tunes = plan.recipe.tune > 0
    tuned = _tuned(work) if tunes else None
    others = len(plan.other_shards)
    # Tuning is not gone on with in its middle: it and the writing of what it gives start again.
    count = others + len(plan.layers)
    with Writer(partial, count, anew=tunes, shared=not tunes) as writer:
        for names in plan.other_shards[writer.shards.done :]:
            tensors: dict[str, Tensor] = {}
            for name in names if writer.shards.writes_next else ():  # rotated there, if it is
                tensors |= {name: plan.source.shards.read([name], plan.device)[name].cpu()}
            writer.add_shard(tensors if tuned is None else tuned.of(tensors))
            del tensors  # else they are here while all blocks are computed
        if not tunes:
            waiting = blocks_waiting(plan)
            for number, (block, about) in enumerate(work.blocks(writer.shards, others)):
                writer.add_shard(block, about, waiting=waiting if number < waiting else 0)
                del block  # else it is still here when the next but one is computed
        else:
            for block in [{}] * len(plan.layers) if tuned is None else tuned.blocks():
                writer.add_shard(block)
        report("writing", plan.weights, plan.weights)
        writer.copy(plan.source.folder, plan.source.other_files())
        largest = max(entry["rank"] for entry in work.layers.entries.values())
        bound = largest if plan.recipe.rank == "auto" else plan.recipe.rank
        outcome: Outcome | None = None if tuned is None else tuned.outcome
        quantization = _quantization_config(plan, bound, calibration, outcome)
        config = {**without_own_path(plan.source.config), layout.CONFIG_KEY: quantization}
        writer.add_text(layout.CARD, card.packed(quantization))
        bits = 8 * writer.packed_bytes() / plan.weights
        writer.finish(config, work.layers.entries, work.changed)
    host_peak, device_peak = _peaks(peak, world)
    after = world.lead(lambda: sum(path.stat().st_size for path in plan.out.glob("*.safetensors")))
    skeleton.empty(plan.model)  # of a rotated plan only what was made stays
    seconds = time.monotonic() - began
    return Conversion(
        plan.out,
        plan,
        work.layers.entries,
        work.changed,
        bits,
        after,
        seconds,
        host_peak,
        device_peak,
        calibration,
        outcome,
    )


def _peaks(peak: Peak, world: World) -> tuple[int | None, int | None]:
    """Of all processes of this host, whose memory is one, and of the fullest GPU there is."""
    every = world.gather((peak.host(), peak.device()))
    first = world.rank - world.local_rank
    here = [host for host, _ in every[first : first + world.local_size] if host is not None]
    devices = [device for _, device in every if device is not None]
    return sum(here) if here else None, max(devices, default=None)


def _check_same(conversion: dict[str, Any], world: World) -> None:
    """Refuse processes that are about to do different things."""
    world.gather(None)  # all have looked at the output before anything is written there
    found = list(differences(world.broadcast(conversion), conversion))
    if found:
        raise SourceError(
            f"process {world.rank} of {world.size}",
            f"another conversion than that of process 0: {'; '.join(found[:3])}",
            needed="the same model, text, versions and kind of device in all processes",
            do="Give all hosts the same.",
        )


@contextmanager
def _weights_checked(plan: Plan, partial: Partial, report: Progress) -> Iterator[None]:
    """Runs the body while all weights are read and checked; what is wrong with them goes first.

    Nobody waits for that after an error, save one whose cause may be found there: activations that
    are not finite, by weights that are not. Processes share the tensors.
    """
    report("checking weights", 0, plan.weights)
    world, names = partial.world, sorted(plan.source.shards.tensors)
    stopped = Event()
    with ThreadPoolExecutor(1, "check") as thread:
        checking = thread.submit(plan.source.check_finite, names[world.part(len(names))], stopped)
        try:
            yield
        except SourceError:
            raise
        except BaseException:
            stopped.set()
            raise
        finally:
            checksums = checking.result()
    weights = fingerprint({k: v for own in world.gather(checksums) for k, v in own.items()})
    if partial.decided("weights", weights) != weights:
        raise partial.refuse("the model's weights are not what they were when it was begun")


def _tuned(work: Work) -> Tuned | None:
    """All blocks quantized, each kept in a file of its own, and tuned together."""
    names = [f"untuned/{index + 1:05d}.safetensors" for index in range(len(work.plan.layers))]
    with Series(work.partial, names) as files:
        for tensors, about in work.blocks(files, 0):
            files.add(tensors, about)
    return tune(work, files)


def _quantization_config(
    plan: Plan, rank: int, calibration: dict[str, Any] | None, tuning: Outcome | None
) -> dict[str, Any]:
    recipe = plan.recipe
    lorc = {"rank": rank, "factors": recipe.factors} if rank > 0 else None
    features = ["lorc"] if lorc else []
    weights: dict[str, Any] = {
        "format": "e2m1",
        "group_size": recipe.group_size,
        "scales": recipe.scales,
    }
    if recipe.codebooks == "pair":
        features.append("codebooks")
        weights |= {"format": "codebooks", "codebooks": codebook.PAIR}
    return {
        "quant_method": layout.FORMAT,
        "format_version": layout.FORMAT_VERSION,
        "producer": {"name": "zqfp-convert", "version": __version__},
        "required_features": features,
        "weights": weights,
        "activations": {"format": "e4m3", "scale": "token", "dynamic": True},
        "lorc": lorc,
        "ignore": sorted(plan.left_alone),
        "recipe": recipe.to_json(),
        "calibration": calibration,
        "tuning": None
        if tuning is None
        else {"kl_before": tuning.kl_before, "kl_after": tuning.kl_after, "kept": tuning.kept},
        "source": {
            **origin(plan.source.folder),
            "bytes": plan.bytes_before,
            "dtype": str(plan.dtype).removeprefix("torch."),
        },
        "made_on": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": describe(plan.device),
        },
    }
