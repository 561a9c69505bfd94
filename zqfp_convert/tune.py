"""Measures schedules for the shapes of quantized layers, and keeps them for this machine's GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.checkpoint.source import hub
from zqfp_convert.errors import OptionError
from zqfp_convert.model.device import resolve_device
from zqfp_convert.runtime import paths, siblings
from zqfp_convert.runtime.kernels import hopper
from zqfp_convert.runtime.kernels.hopper import schedules, tuning
from zqfp_convert.runtime.kernels.hopper.layout import COLUMNS, ROWS, chunk_bytes
from zqfp_convert.runtime.kernels.hopper.schedules import Entry

Shape = tuple[int, int]
Report = Callable[[str, int, int], None]

MOST_TOKENS = 1 << 20
MEMORY_BOUND = 64  # tokens up to which the weights' bytes are what takes time


@dataclass(frozen=True)
class Tuned:
    """What was found for a shape and a number of tokens."""

    entry: Entry

    @property
    def path(self) -> str:
        """The faster one, without low-rank compensation, which only the expanded one pays for."""
        return "expanded" if self.entry.expanded < self.entry.at_best else "fused"

    @property
    def decodes(self) -> bool:
        """Whether the product for few tokens is the faster one of the fused path."""
        return self.entry.at_best < self.entry.fused

    @property
    def spelled(self) -> dict[str, int]:
        """The schedule of the fused path, what is not usual in it."""
        return schedules.spelled(self.entry.schedule)

    @property
    def read_rate(self) -> float | None:
        """Bytes of weights a second, for few tokens, the activations' quantization included."""
        if self.entry.tokens > MEMORY_BOUND:
            return None
        size = self.entry.rows * self.entry.columns * chunk_bytes(1) / (ROWS * COLUMNS)
        return size / self._seconds

    @property
    def flops(self) -> float:
        """Operations a second, the activations' quantization included."""
        return 2 * self.entry.rows * self.entry.columns * self.entry.tokens / self._seconds

    @property
    def _seconds(self) -> float:
        return min(self.entry.expanded, self.entry.at_best) / 1e6

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        rates = {"bytes_per_second": self.read_rate, "flops": self.flops}
        found = {"schedule": self.spelled, "path": self.path, "decodes": self.decodes}
        return asdict(self.entry) | found | rates


def tune(
    checkpoints: Sequence[str | Path] = (),
    shapes: Sequence[Shape] = (),
    tokens: Sequence[int] = (),
    device: str | torch.device | None = None,
    progress: Report | None = None,
) -> Iterator[Tuned]:
    """Measure, and yield what is found; after each shape it is kept in `schedules.tuned_path`.

    Args:
        checkpoints: folders, or repositories on the Hub, whose layers' shapes to measure.
        shapes: more of them, (N, K); without any, those of the table that comes with the package.
        tokens: numbers of tokens, M; those of that table when absent.
        device: a Hopper GPU; the first GPU when absent.
        progress: called as work goes on.

    Raises:
        OptionError: an impossible shape or number; no Hopper GPU, or no NVRTC.
        CheckpointError: no packed checkpoint.
        OutputError: the table cannot be written.
    """
    wanted = wanted_shapes(checkpoints, shapes)
    counts = tuple(sorted(set(tokens))) or tuning.TOKENS
    for count in counts:
        if not 1 <= count <= MOST_TOKENS:
            raise OptionError(
                "tokens", str(count), needed=f"1 to {MOST_TOKENS}", do="Give other --tokens."
            )
    target = hopper_device(device)
    total = len(wanted) * len(counts)
    done = 0
    for rows, columns in wanted:
        measured = []
        entries = tuning.tune(rows, columns, counts)
        for count in counts:
            if progress is not None:
                progress(f"{rows} x {columns}, {count} tokens", done, total)
            with torch.cuda.device(target):
                measured.append(next(entries))
            done += 1
            yield Tuned(measured[-1])
        torch.cuda.empty_cache()
        schedules.keep(measured, target.index)


def wanted_shapes(checkpoints: Sequence[str | Path], shapes: Sequence[Shape] = ()) -> list[Shape]:
    """The distinct shapes (N, K) of the checkpoints' layers, and those given; else the shipped.

    Layers that are multiplied at once count as one, beside each alone.

    Raises:
        OptionError: a shape below 1, or a checkpoint whose layers take no kernels.
        CheckpointError: no packed checkpoint.
    """
    wanted: dict[Shape, None] = {}
    for checkpoint in checkpoints:
        packed = PackedCheckpoint(hub.fetch(checkpoint))
        if packed.scales == "free":
            raise OptionError(
                str(checkpoint),
                "free scales, whose layers take the reference path",
                needed="scales m1 or m2",
                do="There is nothing to tune for it.",
            )
        layers = {name: packed.manifest["layers"][name]["shape"] for name in packed.layers}
        for rows, columns in [*layers.values(), *_at_once(layers)]:
            wanted[rows, columns] = None
    for rows, columns in shapes:
        if rows < 1 or columns < 1:
            raise OptionError(
                "shapes", f"{rows}x{columns}", needed="1 or more of each", do="Give other --shapes."
            )
        wanted[rows, columns] = None
    return list(wanted or schedules.shipped().shapes)


def _at_once(layers: Mapping[str, Shape]) -> Iterator[Shape]:
    """Of layers that may get the same input: all N together, and K."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in layers)
    for parent, names in product(parents, siblings.SETS):
        members = [layers.get(f"{parent}.{name}") for name in names]
        shapes = [shape for shape in members if shape is not None]
        if len(shapes) == len(names) and len({columns for _, columns in shapes}) == 1:
            yield sum(rows for rows, _ in shapes), shapes[0][1]


def table_path(device: str | torch.device | None = None) -> Path:
    """Where the table of a GPU is kept."""
    return schedules.tuned_path(hopper_device(device).index)


def hopper_device(device: str | torch.device | None) -> torch.device:
    """The GPU to measure on.

    Raises:
        OptionError: it is no Hopper GPU, or NVRTC is missing.
    """
    target = resolve_device(device)
    if target.type != "cuda":
        found = "no GPU" if device is None else f"{target} is no GPU"
    elif torch.cuda.get_device_capability(target) != paths.HOPPER:
        found = f"{torch.cuda.get_device_name(target)}, which is no Hopper GPU"
    elif not hopper.available():
        found = "no NVRTC, which compiles the kernels"
    else:
        return target
    raise OptionError(
        "tune",
        found,
        needed="a Hopper GPU (H100, H200, H20: compute capability 9.0) and NVRTC, as PyTorch's "
        "CUDA build brings it",
        do="Nothing has to be tuned without: Hopper's kernels go by the table that comes with the "
        "package, those for other GPUs by rules of their own.",
    )
