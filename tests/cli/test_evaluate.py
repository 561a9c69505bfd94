"""`zqfp-convert evaluate` as it is typed, on tiny random models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from architectures import QUICK, Maker, write_model, write_tokenizer
from typer.testing import CliRunner, Result

import zqfp_convert
from zqfp_convert.cli.main import app, arguments

SMALL = ("--window", "16", "--device", "cpu")


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, arguments(["evaluate", *(str(word) for word in words)]))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "some text.txt"
    file.write_text("It was a dark and stormy night; the rain fell in torrents. " * 4)
    return file


@pytest.fixture
def pair(tiny_model: Maker, converted: Maker) -> tuple[Path, str, Path]:
    return converted("llama", "fast"), "--against", tiny_model("llama")


def test_tables(pair: tuple[Path, str, Path], text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Call me Ishmael. " * 9)
    done = run(*pair, "--text", text, "--text", other, *SMALL)
    assert done.exit_code == 0, done.stderr
    assert all("%  " in line for line in done.stderr.splitlines())  # progress at most
    for said in (
        "23 windows of 16 tokens",
        "hidden states",
        "some text.txt",
        "other.txt",
        "mean KL",
        "99.9 %",
        "same top",
        "by position",
        "8-15",
        "log-loss added",
        "±",
    ):
        assert said in done.stdout, said  # fmt: skip


def test_json(pair: tuple[Path, str, Path], text: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run(*pair, "--text", text, *SMALL, "--tokens", "100", "--json", file, "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    found = json.loads(file.read_text())
    assert (found["window"], found["dtype"], found["original_dtype"]) == (16, "float32", "float32")
    (row,) = found["texts"]
    assert (row["text"], row["windows"], row["tokens"]) == ("some text.txt", 6, 90)
    for measured in (row, *row["positions"]):
        for name in ("loss_difference", "kl"):
            assert measured[name]["low"] <= measured[name]["mean"] <= measured[name]["high"]
        assert 0 <= measured["kl_median"] <= measured["kl_99"] <= measured["kl_999"]
        assert 0 <= measured["same_top"] <= 1
        assert min(measured["perplexity"], measured["original_perplexity"]) > 1
    spans = [(bucket["first"], bucket["last"]) for bucket in row["positions"]]
    assert spans == [(1, 1), (2, 3), (4, 7), (8, 15)]
    printed = json.loads(
        run(*pair, "--text", text, *SMALL, "--tokens", "100", "--json", "-").stdout
    )
    assert printed["texts"] == found["texts"]


def test_a_single_window_has_no_interval(pair: tuple[Path, str, Path], text: Path) -> None:
    done = run(*pair, "--text", text, *SMALL, "--tokens", "16", "--json", "-")
    kl = json.loads(done.stdout)["texts"][0]["kl"]
    assert kl["mean"] > 0
    assert kl["low"] is kl["high"] is None
    assert run(*pair, "--text", text, *SMALL, "--tokens", "16").exit_code == 0


def test_text_that_was_calibrated_on(tiny_model: Maker, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    zqfp_convert.convert(tiny_model("llama"), out, calibration=text, **QUICK)
    done = run(out, "--against", tiny_model("llama"), "--text", text, *SMALL)
    assert done.exit_code == 0, done.stderr
    assert "Calibrated on:" in done.stdout


def refused(done: Result, *words: str, code: int = 2) -> None:
    assert done.exit_code == code
    assert isinstance(done.exception, SystemExit)
    assert not done.stdout.strip()
    said = " ".join(done.stderr.split())
    for word in ("Error:", "needed:", *words):
        assert word in said, said


def test_texts_that_cannot_be_used(
    pair: tuple[Path, str, Path], text: Path, tmp_path: Path
) -> None:
    refused(run(*pair, *SMALL), "--text", "none given", ".txt")
    refused(run(*pair, "--text", tmp_path / "none.txt"), "none.txt", "no such file")
    refused(run(*pair, "--text", "wikitext"), "wikitext", "no such file")
    refused(run(*pair, "--text", text, "--window", "128", "--tokens", "99"), "one window of 128")
    short = tmp_path / "short.txt"
    short.write_text("short")
    refused(run(*pair, "--text", short, *SMALL), "short.txt", "5 tokens", "--window")
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9" * 30)
    refused(run(*pair, "--text", latin, *SMALL), "latin.txt", "UTF-8")


def test_models_that_do_not_belong_together(
    pair: tuple[Path, str, Path], text: Path, tmp_path: Path
) -> None:
    out, _, source = pair
    words = ("--text", text, *SMALL)
    larger = write_model(tmp_path / "larger", vocab_size=400)
    write_tokenizer(larger)
    refused(run(out, "--against", larger, *words), "384 tokens", "400", "another-model")
    other = Path(shutil.copytree(source, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(run(out, "--against", other, *words), "another tokenizer", "--against")
    refused(run(source, "--against", source, *words), str(source))
    refused(run(tmp_path / "nowhere", "--against", source, *words), "no such folder")
    refused(run(out, "--against", tmp_path / "nowhere", *words), "no such folder")
    refused(run(out, "--against", out, *words), "already quantized")


def test_where_json_cannot_go(pair: tuple[Path, str, Path], text: Path, tmp_path: Path) -> None:
    words = (*pair, "--text", text, *SMALL, "--json")
    refused(run(*words, tmp_path), "--json", "a folder")
    refused(run(*words, tmp_path / "none" / "x.json"), "--json", "does not exist")
    done = run(*pair, "--json", "-")
    assert done.exit_code == 2
    assert "none given" in json.loads(done.stdout)["error"]
