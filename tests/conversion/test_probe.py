"""The estimate of a conversion's time: what is timed, and how it is scaled up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import QUICK, Maker

from zqfp_convert.conversion import probe
from zqfp_convert.plan import Plan, make_plan
from zqfp_convert.recipe import Recipe


def plan_of(source: Path, out: Path, recipe: str) -> Plan:
    choices = {name: value for name, value in QUICK.items() if name != "device"}
    return make_plan(
        source,
        out,
        recipe=Recipe.named(recipe).changed(**choices),
        calibration=None,
        device="cpu",
        overwrite=False,
        revision=None,
    )


@pytest.mark.parametrize(("least", "seconds", "runs"), [(0.0, 2.0, 2), (6.0, 3.0, 3)])
def test_what_others_take_counts_where_it_lasts(
    least: float,
    seconds: float,
    runs: int,
    tiny_model: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs of 9, 2 and 4 seconds: the first one does not count for a mean."""

    def clock() -> Iterator[float]:
        now = 0.0
        for lasts in (9.0, 2.0, 4.0, 100.0):
            yield now
            now += lasts
            yield now

    ticks, did = clock(), list[int]()
    monkeypatch.setattr(probe.time, "perf_counter", lambda: next(ticks))
    plan = plan_of(tiny_model(), tmp_path / "out", "fast")
    assert probe._seconds(plan, lambda: did.append(1), least=least) == seconds
    assert len(did) == runs


def test_rounding_is_timed_as_it_is_done(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a weight in the stored dtype, with the packing, and scaled up to all weights."""
    rounded: list[torch.Tensor] = []
    packed: list[str] = []
    real, pack = probe.quantize_weight, probe.pack

    def quantize(weight: torch.Tensor, *rest: Any) -> Any:
        rounded.append(weight)
        return real(weight, *rest)

    def seconds(plan: Plan, work: Callable[[], object], *, least: float = 0.0) -> float:
        work()
        return 1.0

    monkeypatch.setattr(probe, "quantize_weight", quantize)
    monkeypatch.setattr(probe, "pack", lambda *parts: packed.append("") or pack(*parts))
    monkeypatch.setattr(probe, "_seconds", seconds)
    plan = plan_of(tiny_model(), tmp_path / "out", "fast")
    (found,) = probe._rounding(plan)
    (weight,) = rounded
    largest = max(layer.weights for block in plan.layers for layer in block)
    assert weight.dtype == plan.dtype
    assert weight.numel() == largest  # as all of it fits
    assert found == plan.weights / largest
    assert packed
    (shared,) = probe._rounding(dataclasses.replace(plan, processes=4))
    assert shared == found / 4


def test_processes_do_not_share_all_steps(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(plan: Plan, work: Callable[[], object], *, least: float = 0.0) -> float:
        work()
        return 1.0

    monkeypatch.setattr(probe, "_seconds", seconds)
    plan = plan_of(tiny_model(), tmp_path / "out", "best")
    alone, shared = (
        probe._calibrating(dataclasses.replace(plan, processes=count)) for count in (1, 2)
    )
    for at in range(3):  # passes, quantization of activations, statistics: by tokens
        assert shared[at] == pytest.approx(alone[at] / 2)
    assert shared[3] == alone[3]  # factorizations
    assert alone[4] / 2 <= shared[4] <= alone[4]  # rows are shared, columns are not
