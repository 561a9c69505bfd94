"""Measures a checkpoint beside its bfloat16 original, both in the same way and in turn."""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import transformers
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from zqfp_convert.bench import original as originals
from zqfp_convert.bench import traffic
from zqfp_convert.bench.figures import Benchmark, Figures
from zqfp_convert.bench.subject import Subject
from zqfp_convert.bench.workload import Workload
from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.checkpoint.source import hub
from zqfp_convert.errors import OptionError
from zqfp_convert.model import skeleton
from zqfp_convert.model.device import free_memory, resolve_device
from zqfp_convert.runtime.loader import load

Report = Callable[[str, int, int], None]

SHAPES_COMPILED = 256  # of prompts, for each model: more than torch.compile takes by itself


@dataclass(frozen=True)
class Loaded:
    """A model on its device, and the GPU memory that it took (None on the CPU)."""

    model: PreTrainedModel
    held_bytes: int | None


def bench(
    checkpoint: str | Path,
    *,
    prompts: tuple[int, ...] = (),
    context: int | None = None,
    new_tokens: int = Workload.new_tokens,
    repeats: int = Workload.repeats,
    baseline: bool = True,
    original: str | None = None,
    device: str | torch.device | None = None,
    progress: Report | None = None,
) -> Benchmark:
    """Tokens a second of a packed checkpoint, and of the bfloat16 model beside it.

    Args:
        checkpoint: a folder, or a repository on the Hub.
        prompts, context, new_tokens, repeats: what to measure, see `Workload`; lengths that are
            not given are the usual ones, as far as the model's positions go.
        baseline: measure the bfloat16 model too, if there is room.
        original: its folder, or a repository on the Hub; by default the one that the checkpoint
            has on record, else random weights.
        device: where to run; the first GPU when there is one.
        progress: called as work goes on.

    Raises:
        ZqfpError: what `load` raises; a workload that the model or the memory cannot take.
    """
    report = progress or _silent
    target = resolve_device(device)
    packed_checkpoint = PackedCheckpoint(hub.fetch(checkpoint))
    folder = packed_checkpoint.folder
    config = skeleton.build(folder).config
    chosen = Workload.fitting(config, prompts, context, new_tokens, repeats)
    found = originals.find(packed_checkpoint, original) if baseline else None
    report("measuring the memory", 0, 0)
    bandwidth = traffic.read_bandwidth(target)
    report("loading the checkpoint", 0, 0)
    with _room(target):
        packed = held(lambda: load(folder, target, originals.DTYPE), target)
    beside, about, notes = None, None, list[str]()
    if baseline:
        needed, free = originals.size(found or folder), free_memory(target)
        if free is not None and needed > free:
            notes.append(_no_room(f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"))
        else:
            report("loading the bf16 model", 0, 0)
            try:
                if found is None:
                    beside = held(lambda: originals.random(folder, target), target)
                else:
                    beside = held(lambda: originals.read(found, target), target)
            except torch.OutOfMemoryError:
                notes.append(_no_room("out of memory while it was loaded"))
            about = str(found) if found else "random weights"
    return measure(packed, beside, about, chosen, bandwidth, notes, report)


def held(make: Callable[[], PreTrainedModel], device: torch.device) -> Loaded:
    """Make a model, and see how much of the GPU's memory it takes."""
    before = _allocated(device)
    model = make()
    after = _allocated(device)
    return Loaded(model, None if before is None or after is None else after - before)


def measure(
    packed: Loaded,
    bf16: Loaded | None,
    original: str | None,
    workload: Workload,
    bandwidth: float,
    notes: list[str],
    report: Report,
) -> Benchmark:
    """Measure a packed model and, unless it is None, a bfloat16 one on the same device.

    Args:
        packed, bf16: the models.
        original: what the bfloat16 one is.
        workload: what to measure.
        bandwidth: of reading, in bytes a second.
        notes: what a reader has to know already; more are added.
        report: called as work goes on.

    Raises:
        OptionError: the packed model runs out of memory.
    """
    device = packed.model.device
    with torch._dynamo.config.patch(
        recompile_limit=SHAPES_COMPILED, accumulated_recompile_limit=4 * SHAPES_COMPILED
    ):
        with _room(device):
            subjects = {"packed": _warm("packed", packed, workload, notes, report)}
        if bf16 is not None:
            try:
                subjects["bf16"] = _warm("bf16", bf16, workload, notes, report)
            except torch.OutOfMemoryError:
                notes.append(_no_room("out of memory while it ran"))
                bf16 = None
        times = _times(subjects, workload, report)
    figures = {}
    for name, loaded in (("packed", packed), ("bf16", bf16)):
        if loaded is not None:
            figures[name] = _figures(subjects[name], loaded, times[name])
    return Benchmark(
        _name(device),
        {"torch": str(torch.__version__), "transformers": str(transformers.__version__)},
        workload,
        bandwidth,
        figures["packed"],
        figures.get("bf16"),
        original if bf16 is not None else None,
        notes,
    )


@dataclass
class _Times:
    prefill: dict[int, list[float]]
    decode: list[float]
    queued: list[float]


def _warm(
    name: str, loaded: Loaded, workload: Workload, notes: list[str], report: Report
) -> Subject:
    report(f"warming up: {name}", 0, 0)
    subject = Subject(loaded.model, workload)
    try:
        subject.warm_up()
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()
        notes.append(f"{name}: not compiled, so slower ({reason[0][:160] if reason else error!r})")
    return subject


def _times(subjects: dict[str, Subject], workload: Workload, report: Report) -> dict[str, _Times]:
    """Of each model, all repeats; the models take turns."""
    times = {name: _Times({n: [] for n in workload.prompts}, [], []) for name in subjects}
    for repeat in range(workload.repeats):
        report("measuring", repeat, workload.repeats)
        for length in workload.prompts:
            for name, subject in subjects.items():
                times[name].prefill[length].append(subject.prefill_seconds(length))
        for name, subject in subjects.items():
            seconds, queued = subject.decode_seconds()
            times[name].decode.append(seconds)
            times[name].queued.append(queued / seconds)
    return times


def _figures(subject: Subject, loaded: Loaded, times: _Times) -> Figures:
    return Figures(
        weight_bytes=traffic.weight_bytes(subject.model),
        held_bytes=loaded.held_bytes,
        prefill={length: length / median(taken) for length, taken in times.prefill.items()},
        decode=subject.workload.new_tokens / median(times.decode),
        queued=median(times.queued),
        read=traffic.read_for_a_token(subject.model, subject.cache),
        compiled=subject.compiled,
    )


@contextmanager
def _room(device: torch.device) -> Iterator[None]:
    """Says what to do where the memory is too small for the packed model."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OptionError(
            f"memory of {device}",
            str(error).split(".")[0],
            needed="room for the model, its cache and its activations",
            do="Give shorter --prompt-tokens, a shorter --context or another --device.",
        ) from error


def _allocated(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _no_room(why: str) -> str:
    return f"the bf16 model does not fit beside the packed one ({why}), and was left out"


def _silent(text: str, done: int, total: int) -> None:
    """No progress."""
