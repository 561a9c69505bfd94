"""Which table a schedule is taken from: what was tuned here, else what comes with the package."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zqfp_convert.runtime.kernels.hopper import schedules
from zqfp_convert.runtime.kernels.hopper.multiply import SHARED_LIMIT, Schedule
from zqfp_convert.runtime.kernels.hopper.schedules import Entry, Table

SHAPE = (4096, 14336)  # in the table that comes with the package
MINE = Schedule(8, stages=3)


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the tuned table is."""
    monkeypatch.setattr(schedules, "tuned_path", lambda device: tmp_path / "a" / "gpu.json")
    processors = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: processors)
    schedules.forget()
    yield tmp_path / "a" / "gpu.json"
    schedules.forget()


def entry(rows: int, columns: int, tokens: int) -> Entry:
    return Entry(rows, columns, tokens, MINE, 1.0, 2.0)


def chosen(tokens: int, rows: int, columns: int) -> Schedule:
    return schedules.choose(tokens, (rows,), columns, 0)


def test_tuned_goes_first_for_its_shape_alone(path: Path) -> None:
    shipped = chosen(1, *SHAPE)
    assert schedules.keep([entry(*SHAPE, 1)], 0) == path
    assert chosen(1, *SHAPE) == MINE != shipped
    other = schedules.shipped().entry(1, 4096, 4096).schedule
    assert chosen(1, 4096, 4096) == other
    path.unlink()
    schedules.forget()
    assert chosen(1, *SHAPE) == shipped


def test_numbers_of_tokens_that_were_not_tuned_come_from_the_shipped_table() -> None:
    want = {tokens: chosen(tokens, *SHAPE) for tokens in (8, 16, 8192, 10**5)}
    schedules.keep([entry(*SHAPE, tokens) for tokens in (1, 4096)], 0)
    for tokens, schedule in want.items():
        assert chosen(tokens, *SHAPE) == schedule
    assert chosen(3000, *SHAPE) == MINE


def test_keeping_twice(path: Path) -> None:
    schedules.keep([entry(64, 64, 1), entry(64, 64, 16)], 0)
    better = Entry(64, 64, 16, Schedule(16, stages=5), 0.5, 1.0)
    schedules.keep([better, entry(32, 64, 1)], 0)
    assert schedules.read(path) == [entry(32, 64, 1), entry(64, 64, 1), better]


@pytest.mark.parametrize(
    "text",
    [
        "not JSON",
        "{}5",
        '[{"rows": 1}]',
        '{"version": 2, "entries": [{"rows": 1}]}',
        '{"version": 1, "entries": []}',
        json.dumps([{"rows": 64, "columns": 64, "tokens": 1, "fused": 1.0, "expanded": 1.0,
                     "schedule": {"tokens": 8}}]),
        json.dumps({"version": 2, "entries": [
            {"rows": 64, "columns": 64, "tokens": 1, "fused": 1.0, "expanded": 1.0,
             "schedule": {"tokens": 8, "of_another_version": 1}}]}),
    ],
)  # fmt: skip
def test_stale_tables_are_ignored_aloud_and_once(text: str, path: Path) -> None:
    want = chosen(1, *SHAPE)
    path.parent.mkdir()
    path.write_text(text)
    schedules.forget()
    with pytest.warns(UserWarning, match="zqfp-convert tune") as said:
        assert chosen(1, *SHAPE) == want
    assert str(path) in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen(16, *SHAPE)
        chosen(1, 64, 64)
    schedules.keep([entry(64, 64, 1)], 0)
    assert schedules.read(path) == [entry(64, 64, 1)]


def test_few_tokens_have_the_faster_product() -> None:
    known = [Entry(64, 64, 1, MINE, 9.0, 30.0, 8.0), Entry(64, 64, 4, MINE, 9.0, 30.0, 10.0)]
    schedules.keep([*known, Entry(64, 64, 8, MINE, 9.0, 8.5)], 0)
    assert schedules.read(schedules.tuned_path(0)) == [*known, Entry(64, 64, 8, MINE, 9.0, 8.5)]
    assert schedules.decodes(1, (64,), 64, 8, 0)
    assert not schedules.decodes(1, (64,), 64, 9000, 0)  # no room for so many factors
    assert not schedules.decodes(4, (64,), 64, 8, 0)
    assert not schedules.decodes(8, (64,), 64, 8, 0)
    assert not schedules.prefers_expanded(1, (64,), 64, 0, False, 0)


def test_weights_of_the_same_input_count_as_one() -> None:
    schedules.keep([entry(192, 64, 1)], 0)
    assert schedules.choose(1, (64, 96, 32), 64, 0) == MINE


@pytest.mark.parametrize("apart", [False, True])
def test_expanded_goes_one_weight_at_a_time(apart: bool) -> None:
    """Three small products can take longer than the large one."""
    small = Entry(64, 64, 1, MINE, 9.0, 4.0 if apart else 3.0)
    schedules.keep([small, Entry(192, 64, 1, MINE, 10.0, 1.0)], 0)
    assert schedules.prefers_expanded(1, (64, 64, 64), 64, 0, False, 0) != apart


def test_times_of_another_shape_count_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused time is known for the shape itself, the expanded one only for another K."""
    known = [Entry(64, 64, 1, MINE, 9.0, 3.0), Entry(320, 256, 1, MINE, 40.0, 1.0)]
    monkeypatch.setattr(schedules, "shipped", cache(lambda: Table(known)))
    assert not schedules.prefers_expanded(1, (64,) * 5, 256, 0, False, 0)  # 12 us each


def test_a_pass_over_the_results_counts() -> None:
    """A bias or float16 results cost the expanded path one."""
    schedules.keep([Entry(4096, 64, 1024, MINE, 10.0, 9.0)], 0)
    assert schedules.prefers_expanded(1024, (4096,), 64, 0, False, 0)
    assert not schedules.prefers_expanded(1024, (4096,), 64, 0, True, 0)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 8192])
def test_fitting(tokens: int, groups: int) -> None:
    for schedule in schedules.candidates(tokens, 28672, 14336):
        fitting = schedule.fit(groups)
        assert fitting.shared(groups) <= SHARED_LIMIT
        # As many blocks share 228 KiB as with groups of 128; each takes 1 KiB more.
        if schedule.blocks * (schedule.shared(1) + 1024) <= 228 * 1024:
            assert fitting.blocks * (fitting.shared(groups) + 1024) <= 228 * 1024
        assert 2 * schedule.shares <= fitting.stages <= schedule.stages
