"""The demonstration: real numbers on the model that the package carries."""

from __future__ import annotations

from pathlib import Path

import pytest

from zqfp_convert.demo import run
from zqfp_convert.errors import OutputError


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SAMPLES", 16)
    monkeypatch.setattr(run, "SEQ_LEN", 96)
    monkeypatch.setattr(run, "MEASURED", 12)
    with run.demo(tmp_path / "kept") as shown:
        fast, best = shown.measure("fast"), shown.measure("best")
        lines = list(shown.lines(best.conversion.out))
    assert fast.divergence.original_perplexity < 20  # of 1024 tokens: the model has learnt
    assert fast.divergence.kl > 1.5 * best.divergence.kl > 0
    assert len(lines) == len(run.PROMPTS)
    assert all(
        line.startswith(prompt.strip()) for line, prompt in zip(lines, run.PROMPTS, strict=True)
    )
    assert (tmp_path / "kept" / "best" / "config.json").is_file()


def test_leaves_nothing_unasked() -> None:
    with run.demo() as shown:
        folder = shown.folder
        assert folder.is_dir()
    assert not folder.exists()


def test_refuses_what_exists(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists"), run.demo(tmp_path):
        pass
