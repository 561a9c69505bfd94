"""`zqfp-convert bench` as it is typed, on tiny models on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import Maker
from typer.testing import CliRunner, Result

from zqfp_convert.bench import original, run
from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.cli.main import app

SMALL = ["--device", "cpu", "--prompt-tokens", "24,12", "--context", "16", "--new-tokens", "3",
         "--repeats", "1"]  # fmt: skip


def bench(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", *(str(word) for word in words)])


def test_table(converted: Maker) -> None:
    done = bench(converted(), *SMALL)
    assert done.exit_code == 0, done.stderr
    for said in ("packed", "bf16", "ratio", "prefill of 24 tokens", "prefill of 12 tokens",
                 "decode after 16", "weights", "read for a decoded token", "KV cache",
                 "share of read bandwidth", "bf16 model: random weights"):  # fmt: skip
        assert said in done.stdout
    assert "Error" not in done.stderr  # progress at most
    assert "Warning" not in done.stderr


def test_json(converted: Maker, tiny_model: Maker, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    source = tiny_model("llama")
    done = bench(converted(), *SMALL, "--original", source, "--json", file, "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    figures = json.loads(file.read_text())
    assert figures["original"] == str(source)
    assert set(figures["packed"]["prefill"]) == {"24", "12"}
    assert 1 < figures["ratios"]["weight_bytes"] < 16 / 4
    assert figures["ratios"]["read_bytes"] > 1
    assert figures["packed"]["decode"] > 0
    assert figures["packed"]["held_bytes"] is None
    assert figures["bf16"]["bandwidth_share"] > 0
    assert figures["notes"] == []


def test_without_baseline(converted: Maker) -> None:
    done = bench(converted(), *SMALL, "--no-baseline", "--json", "-")
    figures = json.loads(done.stdout)
    assert (figures["bf16"], figures["original"], figures["ratios"]) == (None, None, None)
    assert "ratio" not in bench(converted(), *SMALL, "--no-baseline").stdout


def test_baseline_that_does_not_fit(converted: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "free_memory", lambda device: 1000)
    done = bench(converted(), *SMALL)
    assert done.exit_code == 0
    assert "does not fit beside the packed one" in done.stdout
    assert "ratio" not in done.stdout


def test_original_on_record(converted: Maker, tiny_model: Maker, tmp_path: Path) -> None:
    packed = Path(shutil.copytree(converted(), tmp_path / "packed"))
    config = json.loads((packed / "config.json").read_text())
    for source, want in ((tiny_model("llama"), str(tiny_model("llama"))),
                         (tiny_model("opt"), "random weights"),
                         (tmp_path / "gone", "random weights")):  # fmt: skip
        config["_name_or_path"] = str(source)
        (packed / "config.json").write_text(json.dumps(config))
        figures = json.loads(bench(packed, *SMALL, "--json", "-").stdout)
        assert figures["original"] == want


def test_original_by_its_name(
    converted: Maker, tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the checkpoint, or in the Hub's cache; nothing is downloaded."""
    packed = Path(shutil.copytree(converted(), tmp_path / "packed"))
    checkpoint = PackedCheckpoint(packed)
    recorded = checkpoint.quantization["source"]
    assert recorded["name"] == tiny_model().name
    assert str(tiny_model().parent) not in (packed / "config.json").read_text()
    assert original.find(checkpoint, None) is None
    beside = shutil.copytree(tiny_model(), tmp_path / recorded["name"])
    assert original.find(checkpoint, None) == beside
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    revision = 40 * "b"
    recorded |= {"repository": "maker/model", "name": "maker/model", "revision": revision}
    assert original.find(checkpoint, None) is None
    cached = tmp_path / "models--maker--model" / "snapshots" / revision
    shutil.copytree(tiny_model(), cached)
    assert original.find(checkpoint, None) == cached


def test_random_weights_are_tied_as_the_model_is(converted: Maker) -> None:
    model = original.random(converted("gemma3"), torch.device("cpu"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(bool((p == 0).all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--context", "120", "--new-tokens", "9"], "at most 128"),
        (["--prompt-tokens", "129"], "at most 128"),
        (["--prompt-tokens", "many"], "whole numbers"),
        (["--device", "cuda:9"], "cuda:9"),
    ],
)
def test_options_that_cannot_be(words: list[str], said: str, converted: Maker) -> None:
    given = SMALL if "--device" not in words else []
    done = bench(converted(), *given, *words)
    assert done.exit_code == 2
    assert said in done.stderr.replace("\n", " ")
    assert isinstance(done.exception, SystemExit)


def test_other_folders(converted: Maker, tiny_model: Maker) -> None:
    done = bench(tiny_model("llama"), *SMALL)
    assert done.exit_code == 2
    assert "quantization_config of zqfp" in done.stderr.replace("\n", " ")
    done = bench(converted(), *SMALL, "--original", "./nowhere")
    assert done.exit_code == 2
    assert "no such folder" in done.stderr.replace("\n", " ")
    done = bench(converted(), *SMALL, "--original", tiny_model("opt"))
    assert done.exit_code == 2
    assert "the model that the checkpoint was made from" in done.stderr.replace("\n", " ")
