"""`zqfp-convert compare` as it is typed."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest
from architectures import Maker
from typer.testing import CliRunner, Result

from zqfp_convert.cli.main import app, arguments
from zqfp_convert.compare import plot
from zqfp_convert.compare.presets import PRESETS, preset

DEMO = Path(__file__).parents[2] / "zqfp_convert" / "demo" / "model"
QUICK = ("--window", "16", "--samples", "2", "--seq-len", "24", "--device", "cpu")


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, arguments(["compare", *(str(word) for word in words)]))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "some text.txt"
    file.write_text("It was a dark and stormy night; the rain fell in torrents. " * 4)
    return file


def test_the_preset_on_the_demo_model_in_a_minute() -> None:
    began = time.process_time()
    done = run(DEMO, "--samples", "8", "--seq-len", "128", "--device", "cpu", "--json", "-")
    assert time.process_time() - began < 60
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["calibration"]["source"] == "written by the model"
    rows = {(row["section"], row["label"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == len(preset("zeroquant-fp", 256, 8))

    def kl(section: str, label: str) -> float:
        return rows[section, label]["texts"][0]["kl"]["mean"]

    assert kl("original", "W16A16") == 0.0
    assert kl("W8A8", "FP-FP") < 0.5 * kl("W4A8", "FP-FP")
    assert kl("E2M1 against E3M0", "E2M1") < kl("E2M1 against E3M0", "E3M0")
    assert kl("E2M1 against E3M0", "E2M1") == kl("W4A8", "FP-FP")
    for scales in ("free", "M1", "M2"):
        assert kl("… with LoRC", scales) < kl("scales of W4A8 FP-FP", scales)
    assert rows["original", "W16A16"]["bits"] == 16
    assert 4 < rows["W4A8", "FP-FP"]["bits"] < 4.2


@pytest.mark.parametrize("name", PRESETS)
def test_tables(name: str, text: Path, tiny_model: Maker) -> None:
    words = ("--preset", name, "--text", text, "--calibration", text, "--group-size", "32")
    done = run(tiny_model("opt"), *words, *QUICK, "--rank", "2")
    assert done.exit_code == 0, done.stderr
    assert all("%  " in line for line in done.stderr.splitlines())  # progress at most
    rows = preset(name, 32, 2)
    for said in (
        "14 windows of 16 tokens",
        f"{len(rows)} configurations",
        "some text.txt",
        "mean KL",
        "perplexity",
        *(row.label for row in rows),
        *(row.section for row in rows),
    ):
        assert said in done.stdout, said


def test_own_rows_and_json(text: Path, tiny_model: Maker, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    words = ("--text", text, *QUICK, "--json", file, "--quiet")
    row = "weights=nvfp4,activations=mxfp8,solver=round"
    done = run(tiny_model("llama"), "--configuration", row, *words)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    found = json.loads(file.read_text())
    original, own = found["rows"]
    assert (own["weights"], own["activations"], own["solver"]) == ("nvfp4", "mxfp8", "round")
    assert own["texts"][0]["text"] == "some text.txt"
    assert own["texts"][0]["kl"]["mean"] > original["texts"][0]["kl"]["mean"] == 0
    assert found["calibration"] is None
    assert found["window"] == 16


def refused(done: Result, *words: str, code: int = 2) -> None:
    assert done.exit_code == code
    assert isinstance(done.exception, SystemExit)
    assert not done.stdout.strip()
    said = " ".join(done.stderr.split())
    for word in ("Error:", "needed:", *words):
        assert word in said, said


def test_what_cannot_be_compared(text: Path, tiny_model: Maker, tmp_path: Path) -> None:
    model = tiny_model("llama")
    refused(run(model, "--preset", "paper"), "--preset", "paper", "zeroquant-fp")
    refused(run(model, "--configuration", "weights=int3"), "weights", "int3", "int4")
    refused(run(model, "--configuration", "wide"), "NAME=VALUE")
    refused(run(model, "--rank", "5000"), "rank", "1024")
    refused(run(model, "--text", tmp_path / "none.txt"), "none.txt", "no such file")
    refused(run(model, "--calibration", tmp_path / "none.txt"), "none.txt", "no such file")
    refused(run(model, "--text", text, "--window", "1000"), "--window", "2 to 128")
    refused(run(model, "--seq-len", "1000"), "--seq-len", "2 to 128")
    refused(run(model, "--text", text, "--window", "128", "--tokens", "99"), "one window of 128")
    refused(run(tmp_path / "nowhere"), "no such folder")
    refused(run(model, "--json", tmp_path / "none" / "x.json"), "--json", "does not exist")
    refused(run(model, "--plot", tmp_path / "x.txt"), "--plot", ".png")
    done = run(model, "--preset", "paper", "--json", "-")
    assert "paper" in json.loads(done.stdout)["error"]


def test_a_plot_needs_its_extra(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "x.png"
    refused(run(tiny_model("llama"), "--plot", file), "matplotlib", "zqfp-convert[report]")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_a_plot(text: Path, tiny_model: Maker, tmp_path: Path) -> None:
    file = tmp_path / "x.svg"
    row = ("--configuration", "weights=int8,solver=round")
    done = run(tiny_model("llama"), *row, "--text", text, *QUICK, "--plot", file)
    assert done.exit_code == 0, done.stderr
    assert "<svg" in file.read_text(encoding="utf-8")
