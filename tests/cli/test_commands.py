"""The command line as it is typed, on the small trained model that the package carries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from zqfp_convert.cli.main import app, arguments
from zqfp_convert.errors import SourceError

DEMO = Path(__file__).parents[2] / "zqfp_convert" / "demo" / "model"
SMALL = ["--samples", "2", "--seq-len", "16"]


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, arguments([str(word) for word in words]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    done = run(DEMO, out, "--device", "cpu", *SMALL)
    assert done.exit_code == 0, done.stderr
    for said in ("bits a weight", "least exact layers", "zqfp_convert.load", "self-generated"):
        assert said in done.stdout
    assert "\r" not in done.stderr  # lines, no bar, where standard error is no terminal
    return out


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (["MODEL", "OUT"], ["convert", "MODEL", "OUT"]),
        (["--recipe", "fast", "MODEL", "OUT"], ["convert", "--recipe", "fast", "MODEL", "OUT"]),
        (["inspect", "OUT"], ["inspect", "OUT"]),
        (["./inspect", "OUT"], ["convert", "./inspect", "OUT"]),
        (["--help"], ["--help"]),
        (["-q", "inspect", "OUT"], ["inspect", "-q", "OUT"]),
        (["-q", "MODEL", "OUT"], ["convert", "-q", "MODEL", "OUT"]),
        (["evaluate", "OUT", "--json"], ["evaluate", "OUT", "--json", "-"]),
        (["bench", "--json", "--debug", "OUT"], ["bench", "--json", "-", "--debug", "OUT"]),
        (["bench", "OUT", "--json", "F"], ["bench", "OUT", "--json", "F"]),
        (["inspect", "OUT", "--json"], ["inspect", "OUT", "--json"]),
        ([], ["--help"]),
    ],
)
def test_arguments(given: list[str], want: list[str]) -> None:
    assert arguments(given) == want


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = run(DEMO, tmp_path / "out", "--dry-run")
    assert done.exit_code == 0
    assert "mlp.down_proj" in done.stdout
    plan = json.loads(run(DEMO, tmp_path / "out", "--dry-run", "--json").stdout)
    assert sum(kind["count"] for kind in plan["kinds"]) == plan["layers"]
    assert plan["disk"]["output"] == plan["bytes_after"] < plan["disk"]["free"]
    assert plan["estimated_seconds"] > 0
    assert plan["architecture"] == "LlamaForCausalLM"
    assert plan["recipe"]["name"] == "best"
    assert 4 < plan["bits"] < 5
    assert not list(tmp_path.iterdir())


def test_every_part_has_an_option(tmp_path: Path) -> None:
    words = "--no-act-order --sweeps 1 --asymmetry 0 --alternations 2 --offset none --rank 4"
    words += " --codebooks e2m1 --scales m1 --group-size 64 --tune 3"
    words += " --tune-samples 9 --rotation none"
    done = run(DEMO, tmp_path / "out", "--dry-run", "--json", *words.split())
    recipe = json.loads(done.stdout)["recipe"]
    want = {"activation_order": False, "sweeps": 1, "asymmetry": 0, "low_rank_rounds": 2}
    want |= {"center_norms": False, "rank": 4, "codebooks": "e2m1", "scales": "m1"}
    want |= {"group_size": 64, "tune": 3, "tune_samples": 9, "rotation": "none"}
    assert recipe == recipe | want
    usual = json.loads(run(DEMO, tmp_path / "out", "--dry-run", "--json").stdout)["recipe"]
    assert usual["activation_order"] is True
    assert usual["center_norms"] is True
    assert usual["codebooks"] == "pair"
    wrong = run(DEMO, tmp_path / "out", "--asymmetry", "2")
    assert wrong.exit_code == 2
    assert "a number from 0 to 1" in wrong.stderr


def test_ranks_by_what_they_gain(tmp_path: Path) -> None:
    done = run(DEMO, tmp_path / "out", "--dry-run", "--rank", "auto")
    assert "rank auto" in done.stdout
    assert "at most" in done.stdout
    plan = json.loads(run(DEMO, tmp_path / "out", "--dry-run", "--json", "--rank", "auto").stdout)
    assert plan["recipe"]["rank"] == "auto"
    done = run(DEMO, tmp_path / "a", "--recipe", "fast", "--rank", "auto")
    assert "rank of the low-rank compensation: 0 in 28 of 28 layers" in done.stdout
    again = ["--recipe", "fast", "--rank", "auto", "--json", "--overwrite"]
    result = json.loads(run(DEMO, tmp_path / "a", *again).stdout)
    assert result["ranks"] == {"0": 28}
    assert result["bits"] < plan["bits"]
    assert f"{result['bits']:.2f} bits a weight" in done.stdout
    for wrong in ("automatic", "8.5", "-1", "1025"):
        refused = run(DEMO, tmp_path / "b", "--rank", wrong)
        assert refused.exit_code == 2
        assert "a whole number from 0 to 1024, or auto" in refused.stderr.replace("\n", " ")


def test_json_of_wrong_use(tmp_path: Path) -> None:
    for words in (["--samples", "few"], ["--nonsense"]):
        done = run(DEMO, tmp_path / "out", *words, "--json")
        assert done.exit_code == 2
        assert list(json.loads(done.stdout)) == ["error"]
        assert words[0] in json.loads(done.stdout)["error"]
        assert not run(DEMO, tmp_path / "out", *words).stdout


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    done = run(DEMO, tmp_path / "out", "--dry-run", "--ignore", "down_proj", "--ignore", "dwn*")
    assert done.exit_code == 2
    assert "Error: --ignore: 'dwn*'" in done.stderr
    assert run(DEMO, tmp_path / "out", "--dry-run", "--ignore", "down_proj").exit_code == 0


def test_json_and_quiet(tmp_path: Path) -> None:
    done = run(DEMO, tmp_path / "a", "--recipe", "fast", "--json")
    result = json.loads(done.stdout)
    assert result["layers"] == 28
    assert result["bytes_after"] < result["bytes_before"]
    done = run(DEMO, tmp_path / "b", "--recipe", "fast", "--quiet", "--scales", "m1")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


def test_existing_output(made: Path) -> None:
    before = (made / "config.json").read_bytes()
    done = run(DEMO, made, "--recipe", "fast")
    assert done.exit_code == 2
    assert str(made) in done.stderr.replace("\n", "")
    assert "--overwrite" in done.stderr
    assert (made / "config.json").read_bytes() == before


def test_inspect(made: Path) -> None:
    done = run("inspect", made)
    assert done.exit_code == 0
    assert "model.layers.3.mlp.down_proj" in done.stdout
    assert "192 x 384" in done.stdout
    described = json.loads(run("inspect", made, "--json").stdout)
    assert len(described["layers"]) == 28
    assert described["quantization_config"]["quant_method"] == "zqfp"


def test_verify(made: Path, tmp_path: Path) -> None:
    proved = json.loads(run("verify", made, "--against", DEMO, "--json").stdout)
    assert proved["ok"]
    assert proved["exact_cast"]
    assert len(proved["weight_errors"]) == 28
    shard = next(made.glob("*-00002-*.safetensors"))
    copy = tmp_path / "damaged"
    copy.mkdir()
    for file in made.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    (copy / shard.name).write_bytes(data)
    done = run("verify", copy)
    assert done.exit_code == 2
    assert shard.name in done.stderr.replace("\n", "")
    assert "shard-hash" in done.stderr


def test_generate(made: Path) -> None:
    first = run("generate", made, "The ", "--tokens", "8", "--device", "cpu")
    again = run("generate", made, "The ", "--tokens", "8", "--device", "cpu")
    assert first.exit_code == 0, first.stderr
    assert first.stdout.startswith("The ")
    assert len(first.stdout) > len("The \n")
    assert first.stdout == again.stdout


def test_errors_are_messages(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere", tmp_path / "out")
    assert done.exit_code == 2
    assert "no such folder" in done.stderr
    assert isinstance(done.exception, SystemExit)
    assert isinstance(run(tmp_path / "nowhere", tmp_path / "out", "--debug").exception, SourceError)
    assert run("inspect", DEMO).exit_code == 2
    for option, value in (("--group-size", "48"), ("--asymmetry", "2"), ("--scales", "m3")):
        done = run(DEMO, tmp_path / "out", option, value)
        assert done.exit_code == 2
        assert done.stderr.startswith(f"Error: {option}: ")
    assert not list(tmp_path.iterdir())


def test_model_named_like_a_command(tmp_path: Path) -> None:
    """In a process of its own, as a shell starts it."""
    (tmp_path / "inspect").symlink_to(DEMO)
    command = [sys.executable, "-m", "zqfp_convert", "./inspect", "out", "--recipe", "fast", "-q"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=tmp_path, env=os.environ
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out" / "zqfp_manifest.json").is_file()
