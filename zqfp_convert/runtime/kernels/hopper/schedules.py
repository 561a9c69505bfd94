"""How products are cut up, by their shape: what was measured, and what can be tried.

A table has the fastest schedule for each of some shapes and numbers of tokens, and the time of the
expanded path beside it. One comes with the package; `zqfp-convert tune` makes another for the
user's GPU and shapes, which goes first.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from zqfp_convert.errors import OutputError
from zqfp_convert.runtime.kernels.hopper import decode
from zqfp_convert.runtime.kernels.hopper.layout import COLUMNS, RANKS
from zqfp_convert.runtime.kernels.hopper.multiply import SHARED_LIMIT, Schedule

SHIPPED = Path(__file__).parent / "table.json"
BYTES_PER_MICROSECOND = 4e6  # what an H200 copies, read and written
LARGEST_TOKENS = 256  # of a tile
VERSION = 2  # of a table: what its times mean


@dataclass(frozen=True)
class Entry:
    """What was measured for a shape.

    Attributes:
        rows, columns, tokens: N, K, M.
        schedule: the fastest of the fused product.
        fused, expanded: microseconds from bfloat16 activations to results, without low-rank
            compensation.
        decoded: the same, of the product for few tokens; None where it was not tried.
    """

    rows: int
    columns: int
    tokens: int
    schedule: Schedule
    fused: float
    expanded: float
    decoded: float | None = None

    @property
    def at_best(self) -> float:
        """Microseconds of the faster one of the fused products."""
        return self.fused if self.decoded is None else min(self.fused, self.decoded)


class Table:
    """Entries by shape."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.shapes: dict[tuple[int, int], list[Entry]] = {}
        for entry in sorted(entries, key=lambda entry: entry.tokens):
            self.shapes.setdefault((entry.rows, entry.columns), []).append(entry)

    def entry(self, tokens: int, rows: int, columns: int) -> Entry:
        """That of the shape, or of the one most like it, with as many tokens or the next number."""

        def distance(shape: tuple[int, int]) -> float:
            return abs(math.log(shape[0] / rows)) + abs(math.log(shape[1] / columns))

        entries = self.shapes[min(self.shapes, key=distance)]
        place = bisect_left([entry.tokens for entry in entries], tokens)
        return entries[min(place, len(entries) - 1)]


@cache
def choose(tokens: int, rows: tuple[int, ...], columns: int, device: int) -> Schedule:
    """The schedule, still to be fitted, for M tokens and all N of weights that get the same."""
    return _entry(tokens, sum(rows), columns, device).schedule


@cache
def decodes(tokens: int, rows: tuple[int, ...], columns: int, rank: int, device: int) -> bool:
    """Whether the product for few tokens can be taken, and is the faster one."""
    entry = _entry(tokens, sum(rows), columns, device)
    steps = (-(-rank // RANKS),) * len(rows)
    depth = -(-columns // COLUMNS)
    return entry.at_best < entry.fused and decode.fits(tokens, rows, depth, steps, device)


@cache
def prefers_expanded(
    tokens: int, rows: tuple[int, ...], columns: int, rank: int, finishes: bool, device: int
) -> bool:
    """Whether the expanded path is the faster one: a weight at a time, the fused one all at once.

    `finishes`: low-rank compensation, a bias or float16 results are there, which the expanded path
    spends a pass over the results on, and the fused one nothing.
    """
    whole = _entry(tokens, sum(rows), columns, device)
    best = whole.at_best if decodes(tokens, rows, columns, rank, device) else whole.fused
    fused = best * sum(rows) * columns / (whole.rows * whole.columns)
    expanded = 0.0
    for count in rows:
        entry = _entry(tokens, count, columns, device)
        expanded += entry.expanded * count * columns / (entry.rows * entry.columns)
    # Each time has the quantization of the activations in it, which happens once.
    expanded -= (len(rows) - 1) * 3 * whole.tokens * columns / BYTES_PER_MICROSECOND
    after = 8 * whole.tokens * sum(rows) / BYTES_PER_MICROSECOND if finishes else 0.0
    return expanded + after < fused


@cache
def _entry(tokens: int, rows: int, columns: int, device: int) -> Entry:
    """What was tuned for the shape, unless the shipped table is nearer in the number of tokens."""
    found = [shipped().entry(tokens, rows, columns)]
    tuned = _tuned(device)
    if tuned is not None and (rows, columns) in tuned.shapes:
        found.insert(0, tuned.entry(tokens, rows, columns))
    return min(found, key=lambda entry: (entry.tokens < tokens, abs(entry.tokens - tokens)))


@cache
def shipped() -> Table:
    """The table that comes with the package."""
    return Table(read(SHIPPED))


@cache
def _tuned(device: int) -> Table | None:
    path = tuned_path(device)
    try:
        return Table(read(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{path} is no table of schedules of this version, and is ignored ({error}): "
            "run 'zqfp-convert tune' to measure anew",
            stacklevel=2,
        )
        return None


def tuned_path(device: int) -> Path:
    """Where `zqfp-convert tune` keeps its table for a GPU of this name."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = torch.cuda.get_device_name(device).replace(" ", "-")
    return Path(home) / "zqfp-convert" / f"{name}.json"


def read(path: Path) -> list[Entry]:
    """The entries of a table.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is missing, or no table of this version.
    """
    table = json.loads(path.read_text())
    if not isinstance(table, dict) or table.get("version") != VERSION:
        raise ValueError(f"not version {VERSION}")
    return [
        Entry(**{**entry, "schedule": Schedule(**entry["schedule"])}) for entry in table["entries"]
    ]


def written(entries: Iterable[Entry]) -> str:
    """The text of a table: an entry on each line; a schedule spells what is not usual."""
    lines = []
    for entry in entries:
        values = asdict(entry) | {"schedule": spelled(entry.schedule)}
        lines.append(json.dumps({key: v for key, v in values.items() if v is not None}))
    entries_text = ",\n".join(lines)
    return f'{{"version": {VERSION}, "entries": [\n{entries_text}\n]}}\n'


def spelled(schedule: Schedule) -> dict[str, int]:
    """What is not usual in a schedule, by name."""
    usual = asdict(Schedule(tokens=0))
    return {key: value for key, value in asdict(schedule).items() if value != usual[key]}


def keep(entries: Iterable[Entry], device: int) -> Path:
    """Put entries into the tuned table of a GPU, beside those of other shapes; and use them.

    Raises:
        OutputError: the table cannot be written; it is what it was before.
    """
    path = tuned_path(device)
    try:
        known = read(path)
    except (OSError, ValueError, KeyError, TypeError):
        known = []
    merged = {(entry.rows, entry.columns, entry.tokens): entry for entry in (*known, *entries)}
    try:
        _replace(path, written(merged[key] for key in sorted(merged)))
    except OSError as error:
        raise OutputError(
            str(path),
            f"cannot be written ({error.strerror})",
            needed="a cache folder that can be written",
            do="Make room there, or set XDG_CACHE_HOME to another folder.",
        ) from error
    forget()
    return path


def _replace(path: Path, text: str) -> None:
    """Write a file that has its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        try:
            file.write(text)
            file.close()
            os.replace(file.name, path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise


def forget() -> None:
    """Read the tables anew at the next choice."""
    for function in (choose, decodes, prefers_expanded, _entry, shipped, _tuned):
        function.cache_clear()


def candidates(tokens: int, rows: int, columns: int) -> list[Schedule]:
    """Schedules worth measuring for a shape."""
    size = min(LARGEST_TOKENS, max(8, 1 << (tokens - 1).bit_length()))
    found: list[Schedule]
    if size <= 16:
        found = _few(size)
    elif size <= 64:
        found = _some(size)
    elif tokens <= 512:
        found = _many()
    else:
        found = _most()
    depth = -(-columns // 128)
    return [
        schedule
        for schedule in found
        if schedule.shared(1) <= SHARED_LIMIT and schedule.split <= depth
    ]


def _few(size: int) -> list[Schedule]:
    split = [
        Schedule(size, stages=stages, shares=shares, split=split, blocks=blocks)
        for stages, shares, split, blocks in (
            (8, 1, 1, 4),
            (12, 1, 2, 3),
            (8, 1, 4, 3),
            (12, 1, 4, 3),
            (12, 2, 2, 2),
            (16, 2, 2, 2),
            (32, 2, 1, 1),
            (32, 2, 2, 1),
            (32, 4, 1, 1),
            (16, 4, 2, 1),
            (32, 4, 2, 1),
        )
    ]
    stream = [
        Schedule(size, stages=stages, shares=shares, blocks=blocks, waves=blocks, stream=True)
        for stages, shares, blocks in ((8, 1, 4), (12, 1, 3), (16, 2, 2), (32, 4, 1))
    ]
    stream += [
        Schedule(size, stages=stages, shares=shares, split=split, blocks=blocks, stream=True)
        for stages, shares, split, blocks in (
            (8, 1, 2, 4),
            (4, 1, 4, 4),
            (8, 1, 4, 4),
            (8, 1, 8, 4),
            (16, 2, 2, 2),
            (8, 2, 4, 2),
            (16, 4, 2, 1),
        )
    ]
    tall = [
        Schedule(size, tiles=2, stages=12, blocks=2),
        Schedule(size, tiles=2, stages=14, shares=2, blocks=1, waves=1, stream=True),
        Schedule(size, tiles=2, stages=8, split=2, blocks=2, stream=True),
        Schedule(size, tiles=2, stages=4, split=4, blocks=2, stream=True),
    ]
    return split + stream + tall


def _some(size: int) -> list[Schedule]:
    return [
        Schedule(size, stages=6, split=2, blocks=3),
        Schedule(size, stages=8, split=2, blocks=3),
        Schedule(size, stages=4, split=4, blocks=3),
        Schedule(size, stages=8, shares=4, split=2),
        Schedule(size, tiles=2, stages=6, blocks=2),
        Schedule(size, tiles=2, stages=4, split=2, blocks=2),
        Schedule(size, warpgroups=2, tiles=2, stages=4),
        Schedule(size, stages=5, blocks=3, waves=3, stream=True),
        Schedule(size, tiles=2, stages=10, waves=1, stream=True),
        Schedule(size, warpgroups=2, tiles=2, stages=6, waves=1, stream=True),
        Schedule(size, stages=6, split=2, blocks=3, stream=True),
        Schedule(size, stages=4, split=4, blocks=3, stream=True),
        Schedule(size, tiles=2, stages=4, split=2, blocks=2, stream=True),
        Schedule(size, tiles=2, stages=4, split=4, blocks=2, stream=True),
    ]


def _many() -> list[Schedule]:
    return [
        Schedule(64, stages=8, blocks=2),
        Schedule(64, warpgroups=2, tiles=2, stages=4),
        Schedule(128, stages=8),
        Schedule(128, stages=8, pair=2),
        Schedule(128, stages=8, shares=2),
        Schedule(128, warpgroups=2, stages=6),
        Schedule(128, warpgroups=2, stages=6, split=2),
        Schedule(256, warpgroups=2, stages=4),
        Schedule(256, warpgroups=2, stages=4, split=2),
        Schedule(256, warpgroups=2, stages=5, waves=1, stream=True),
        Schedule(256, warpgroups=2, stages=5, split=2, stream=True),
        Schedule(256, warpgroups=2, stages=5, split=4, stream=True),
        Schedule(128, warpgroups=2, stages=6, split=2, stream=True),
        Schedule(128, warpgroups=2, stages=6, waves=1, stream=True),
        Schedule(128, stages=8, split=2, stream=True),
    ]


def _most() -> list[Schedule]:
    return [
        Schedule(256, warpgroups=2, stages=5, waves=1),
        Schedule(256, warpgroups=2, stages=5, pair=2, waves=1),
        Schedule(256, warpgroups=2, stages=5, waves=1, stream=True),
        Schedule(128, warpgroups=2, stages=6, waves=1),
        Schedule(128, warpgroups=3, stages=6, waves=1),
    ]
