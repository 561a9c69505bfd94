"""Conversions on a GPU: stopped, short of memory, with states elsewhere, and of mixtures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import configuration, random_model, token_ids, write_model, write_tokenizer
from mixtures import original, write_mixture

import zqfp_convert
from zqfp_convert.calibration.norms import find_forms
from zqfp_convert.calibration.stages import statistics
from zqfp_convert.calibration.stream import Entrance
from zqfp_convert.conversion import work
from zqfp_convert.conversion.pipeline import run
from zqfp_convert.errors import Stopped
from zqfp_convert.model.blocks import find_blocks
from zqfp_convert.plan import Place, make_plan
from zqfp_convert.recipe import Recipe

DEVICE = "cuda"
TEXT = "the quick brown fox jumps over the lazy dog; " * 4000
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3}

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", "llama", torch.bfloat16, **WIDE)
    write_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "model"


def convert(
    model: Path, out: Path, place: Place = "device", progress: Any = None
) -> dict[str, str]:
    """What the files of the output hold, by their names."""
    recipe = Recipe.named("best", samples=16, seq_len=64, rank=4)
    text = model.parent / "text.txt"
    device = torch.device(DEVICE)
    plan = make_plan(model, out, recipe=recipe, calibration=text, device=device)
    run(dataclasses.replace(plan, states=place), progress)
    files = sorted(out.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_states_lie_anywhere(model: Path, tmp_path: Path) -> None:
    want = convert(model, tmp_path / "device")
    assert len(want) == 4
    assert convert(model, tmp_path / "host", "host") == want
    assert convert(model, tmp_path / "file", "file") == want


def test_weights_come_as_close_as_on_the_cpu(model: Path, tmp_path: Path) -> None:
    """What GPUs have kernels of their own for; the CPU has plain torch in float32."""
    how = {"calibration": model.parent / "text.txt", "samples": 16, "seq_len": 64, "rank": 4}
    found = []
    for out, device in ((tmp_path / "here", DEVICE), (tmp_path / "there", "cpu")):
        zqfp_convert.convert(model, out, recipe="best", device=device, **how)
        layers = json.loads((out / "zqfp_manifest.json").read_text())["layers"]
        found.append({name: entry["output_error"] for name, entry in layers.items()})
    here, there = found
    assert len(here) == 21
    assert all(here[name] < 1.1 * there[name] for name in there)
    assert sum(here.values()) < 1.02 * sum(there.values())


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(model: Path, tmp_path: Path) -> None:
    def stop(text: str, done: int, total: int) -> None:
        if text.startswith("block 2/3") and "down_proj" in text:
            raise KeyboardInterrupt

    want = convert(model, tmp_path / "whole")
    with pytest.raises(Stopped):
        convert(model, tmp_path / "stopped", progress=stop)
    said: list[str] = []
    have = convert(
        model, tmp_path / "stopped", progress=lambda text, done, total: said.append(text)
    )
    assert any("done before" in text for text in said)
    assert have == want


def test_so_does_one_that_ran_out_of_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def limited(*args: Any, **how: Any) -> Any:
        tried.append(len(args[2].hidden[0]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("no room for so many")
        return statistics(*args, **how)

    def stop(text: str, done: int, total: int) -> None:
        if text.startswith("block 3/3"):
            raise KeyboardInterrupt

    monkeypatch.setattr(work, "statistics", limited)
    want = convert(model, tmp_path / "whole")
    assert max(tried) > 2 >= tried[-1]
    with pytest.raises(Stopped):
        convert(model, tmp_path / "stopped", progress=stop)
    assert convert(model, tmp_path / "stopped") == want


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe"])
def test_a_mixture(arch: str, tmp_path: Path) -> None:
    source = write_mixture(tmp_path / "model", arch, torch.bfloat16)
    (tmp_path / "text.txt").write_text(TEXT)
    assert convert(source, tmp_path / "out")
    packed = zqfp_convert.load(tmp_path / "out", device=DEVICE, dtype=torch.bfloat16)
    whole = original(source).to(DEVICE, torch.bfloat16)
    ids = token_ids().to(DEVICE)
    with torch.no_grad():
        have, want = packed(ids).logits.float(), whole(ids).logits.float()
    assert have.isfinite().all()
    assert float((have - want).norm() / want.norm()) < 0.9  # 1.4 for another model's


@pytest.mark.parametrize(
    ("arch", "form"),
    [("llama", "twice"), ("qwen3", "twice"), ("gemma3", "once, one more"), ("olmo2", "once")],
)
@torch.no_grad()
def test_norms_are_known_in_batches_of_full_size(arch: str, form: str) -> None:
    """Where sums of another order flip some roundings of intermediate values, too."""
    changes = {"hidden_size": 2048, "intermediate_size": 256}
    whole = random_model(configuration(arch, **changes), torch.bfloat16).to(DEVICE)
    for name, parameter in whole.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    blocks = find_blocks(whole)
    entrance = Entrance(blocks, [token_ids(64, 128).to(DEVICE)])
    hidden = 3 * torch.randn_like(entrance.first()[0])
    found = find_forms(blocks.modules[0], entrance.calls(0)(0), hidden)
    assert set(found.values()) == ({form} if DEVICE == "cuda" else {None})
