"""Help pages fit a screen, and completion knows what they know."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from zqfp_convert.cli.main import app, arguments, commands, misspelt

WIDTH, HEIGHT = 80, 40


@pytest.fixture(autouse=True)
def screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("TERM", "dumb")


def page(*words: str) -> list[str]:
    done = CliRunner().invoke(app, arguments(list(words)))
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["", *sorted(commands())])
def test_it_fits(name: str) -> None:
    lines = page(*filter(None, [name, "--help"]))
    assert len(lines) <= HEIGHT
    assert max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    assert "\x1b" not in text
    assert "[bold]" not in text
    if name:
        examples = lines[lines.index("Examples") + 1 :]
        assert 2 <= len([line for line in examples if line.strip()]) <= 3
        assert all(" zqfp-convert" in line for line in examples if line.strip())
    else:
        assert all(f"  {one}  " in text for one in commands())
        assert "Exit codes: 0 done, 1 failed, 2 refused or wrong use, 130 stopped" in text


def test_rare_options_have_a_page() -> None:
    usual, every = "\n".join(page("convert", "-h")), "\n".join(page("convert", "--help-all"))
    for option in ("--sweeps", "--samples", "--revision", "--debug"):
        assert option not in usual
        assert f"  {option}" in every
    for option in ("--recipe NAME", "--dry-run", "--log-file FILE"):
        assert f"  {option}" in usual
        assert f"  {option}" in every
    assert usual == "\n".join(page("convert", "-h"))  # one page does not change the other


def test_nothing_at_all() -> None:
    assert page() == page("--help")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["inspct", "OUT"], "`zqfp-convert inspect`"),
        (["verfy", "OUT"], "`zqfp-convert verify`"),
        (["maker/inspct", "OUT"], None),
        (["inspect", "OUT"], None),
        (["llama", "OUT"], None),
        (["--quiet"], None),
        ([], None),
    ],
)
def test_misspelt_commands(given: list[str], said: str | None) -> None:
    told = misspelt(given)
    assert (told is None) if said is None else (told is not None and said in told)


def complete(shell: str, **about: str) -> set[str]:
    names = {"_ZQFP_CONVERT_COMPLETE": f"complete_{shell}", **about}
    done = subprocess.run(
        [sys.executable, "-m", "zqfp_convert"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **names},
    )
    return set(done.stdout.split("\n"))


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["in"], {"inspect"}),
        (["MODEL", "OUT", "--push"], {"--push-to-hub"}),
        (["MODEL", "OUT", "--swe"], {"--sweeps"}),  # rare ones too
        (["--quiet", "MODEL", "OUT", "--recipe", "f"], {"fast"}),
        (["convert", "MODEL", "OUT", "--scales", "m"], {"m1", "m2"}),
        (["export", "OUT", "DEST", "--to", ""], {"bf16", "compressed-tensors", "gguf"}),
    ],
)
def test_bash_completes(words: list[str], want: set[str]) -> None:
    about = {"COMP_WORDS": "\n".join(["zqfp-convert", *words]), "COMP_CWORD": str(len(words))}
    assert want == {word for word in complete("bash", **about) if word}


def test_zsh_completes() -> None:
    told = " ".join(complete("zsh", _TYPER_COMPLETE_ARGS="zqfp-convert MODEL OUT --rot"))
    assert '"--rotation"' in told
    assert '"--recipe"' not in told
