"""What does not fit the memory at once is done in smaller parts, before the first block too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import QUICK, Maker
from transformers import GenerationMixin, PreTrainedModel

import zqfp_convert
from zqfp_convert.calibration.halfway import Moves
from zqfp_convert.calibration.stages import statistics
from zqfp_convert.conversion import passage, rehearsal, windows, work


def test_fewer_windows_are_written_at_once(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    generate = GenerationMixin.generate

    def limited(model: PreTrainedModel, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
        tried.append(len(prompt))
        if len(prompt) > 4:
            raise torch.OutOfMemoryError("no room for so many")
        return generate(model, prompt, **options)

    monkeypatch.setattr(GenerationMixin, "generate", limited)
    made = zqfp_convert.convert(tiny_model(), tmp_path / "shrunk", **QUICK)
    assert tried == [12, 12, 8, 4, 4, 4]
    monkeypatch.setattr(windows.text, "GENERATED_AT_ONCE", 4)
    again = zqfp_convert.convert(tiny_model(), tmp_path / "small", **QUICK)
    assert made.calibration == again.calibration


def test_a_rehearsal_with_fewer_windows_at_once(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    step = rehearsal._Rehearsal.step

    def limited(self: rehearsal._Rehearsal, index: int) -> None:
        tried.append(len(self.original.hidden[0]))
        if tried[-1] > 1:
            raise torch.OutOfMemoryError("no room for so many")
        step(self, index)

    monkeypatch.setattr(rehearsal._Rehearsal, "step", limited)
    made = zqfp_convert.convert(tiny_model(), tmp_path / "out", **{**QUICK, "rotation": "residual"})
    assert tried[:2] == [4, 2]
    assert set(tried[2:]) == {1}
    assert made.plan.rotation is not None


def test_inputs_are_not_kept_once_memory_has_run_out(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    def limited(*args: Any, moves: Moves, **how: Any) -> Any:
        if moves.keep is not None:
            kept.append(moves)
            raise torch.OutOfMemoryError("no room for inputs")
        return statistics(*args, moves=moves, **how)

    monkeypatch.setattr(work, "statistics", limited)
    monkeypatch.setattr(passage, "spare_bytes", lambda *args: 1 << 40)
    zqfp_convert.convert(tiny_model(), tmp_path / "out", **QUICK)
    assert len(kept) == 1
