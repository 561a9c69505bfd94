"""`--log-file`: plain lines with times, behind what is there, without tokens."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from rich.table import Table
from typer.testing import CliRunner, Result

from zqfp_convert.cli.log import Log
from zqfp_convert.cli.main import app, arguments

DEMO = Path(__file__).parents[2] / "zqfp_convert" / "demo" / "model"
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d  \S|\d{4}-\d\d-\d\d .{14}  +\S")


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, arguments([str(word) for word in words]))


def test_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(warnings, "showwarning", lambda *about: seen.append(about[0]))
    before = warnings.showwarning
    path = tmp_path / "log"
    path.write_text("before\n")
    table = Table("one", "two")
    table.add_row("[red]a[/]", "b")
    with Log(path) as log:
        log.print(table)
        log.print("[bold]fat[/]\n\nand thin")
        log.write("plain")
        warnings.showwarning("careful", UserWarning, "file.py", 1)
    assert seen == ["careful"]  # and shown as always
    assert warnings.showwarning is before
    first, *lines = path.read_text().splitlines()
    assert first == "before"
    assert all(LINE.match(line) for line in lines), lines
    text = "\n".join(lines)
    assert "\x1b" not in text
    for said in ("fat", "and thin", "plain", "UserWarning: careful"):
        assert sum(line.endswith(f"  {said}") for line in lines) == 1, said


def test_tokens_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token, other = "hf_" + 34 * "x", "a secret without a prefix"
    monkeypatch.setenv("HF_TOKEN", other)
    with Log(tmp_path / "log") as log:
        log.write(f"with {token} and {other}.")
    text = (tmp_path / "log").read_text()
    assert token not in text
    assert other not in text
    assert "with hf_*** and hf_***." in text
    done = run("inspect", tmp_path / token, "--log-file", tmp_path / "log")
    assert done.exit_code == 2
    assert token not in (tmp_path / "log").read_text() + done.output


def test_a_conversion_in_silence_is_logged_all_the_same(tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = [DEMO, tmp_path / "out", "--recipe", "fast", "--log-file", log]
    done = run(*words, "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    text = log.read_text()
    for said in ("bits a weight", "recipe", "least exact layers", "zqfp_convert.load"):
        assert said in text
    size = len(text)
    refused = run(*words, "--json")
    assert refused.exit_code == 2
    assert log.read_text()[:size] == text
    assert re.search(r"  Error: .*exists; needed", log.read_text()[size:])


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    done = run("verify", DEMO, "--log-file", tmp_path / "none" / "log")
    assert done.exit_code == 2
    assert "--log-file" in done.stderr
    assert "cannot be written" in done.stderr
