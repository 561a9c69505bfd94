"""Conversions by several processes: as good as by one, and the same again after a failure.

Sums in another order flip a rounding of an activation now and then, which goes through all layers
behind it, as it does for one process with batches of another size. So codes are compared where
nothing has gone before, and beyond that errors and the divergence from the original.
"""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from architectures import QUICK, Maker, token_ids
from dequantized import manifest, read_tensors
from mixtures import write_mixture
from transformers import AutoModelForCausalLM

import zqfp_convert
from zqfp_convert.checkpoint.output.journal import Journal
from zqfp_convert.conversion import convert
from zqfp_convert.conversion.passage import Passage
from zqfp_convert.conversion.work import Work
from zqfp_convert.errors import OptionError, OutputError
from zqfp_convert.parallel import World

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

FEW: dict[str, Any] = {**QUICK, "samples": 7, "rank": 0, "sweeps": 1}
LOW_RANK: dict[str, Any] = {**FEW, "rank": 8}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def together(count: int, source: Path, out: Path, **choices: Any) -> None:
    def work(world: World) -> None:
        convert(source, out, world=world, **choices)

    processes.run(count, work, out.with_name("log"))


def other_codes(one: Path, other: Path) -> float:
    """The share of codes that differ in the layers that are solved first."""
    have, want = read_tensors(one), read_tensors(other)
    assert have.keys() == want.keys()
    differ = total = 0
    layers = [name for name in manifest(one)["layers"] if ".layers.0.self_attn." in name]
    for name in [name for name in layers if name[-6:] in ("q_proj", "k_proj", "v_proj")]:
        changed = have[f"{name}.weight_packed"] ^ want[f"{name}.weight_packed"]
        differ += int(((changed & 15) > 0).sum() + (changed >> 4 > 0).sum())
        total += 2 * changed.numel()
    return differ / total


def close(one: Path, other: Path, tolerance: float) -> None:
    """Hold the manifests of two conversions to each other."""
    have, want = manifest(one)["layers"], manifest(other)["layers"]
    assert list(have) == list(want)
    assert manifest(one)["changed"] == manifest(other)["changed"]
    for name, entry in want.items():
        assert have[name].keys() == entry.keys()
        for error in ("weight_error", "output_error", "activation_error"):
            assert have[name][error] == pytest.approx(entry[error], rel=tolerance)
        for kind in ("shape", "rank", "pooled", "balanced"):
            assert have[name].get(kind) == entry.get(kind)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    assert configs[0] == configs[1]


def as_good(source: Path, one: Path, other: Path) -> None:
    """Hold the divergence from the original of two conversions to each other."""
    original = AutoModelForCausalLM.from_pretrained(source).eval()
    models = [original, *(zqfp_convert.load(folder, device="cpu") for folder in (one, other))]
    with torch.no_grad():
        want, *found = (model(token_ids()).logits.log_softmax(-1) for model in models)
    have, wanted = (float((want.exp() * (want - logits)).sum(-1).mean()) for logits in found)
    assert have == pytest.approx(wanted, rel=0.25)


@pytest.fixture(scope="module")
def alone(tiny_model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`alone(arch, rank)` is what one process makes."""

    @functools.cache
    def make(arch: str, rank: int | str) -> Path:
        out = tmp_path_factory.mktemp("alone") / "out"
        convert(tiny_model(arch), out, **{**FEW, "rank": rank})
        return out

    return make


@pytest.mark.parametrize(
    ("arch", "rank", "count"),
    [("llama", 8, 2), ("llama", "auto", 3), ("opt", 8, 3)],  # OPT: means are folded
)
def test_as_one_process(
    arch: str,
    rank: int | str,
    count: int,
    tiny_model: Maker,
    alone: Callable[..., Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    together(count, tiny_model(arch), out, **{**FEW, "rank": rank})
    assert other_codes(out, alone(arch, rank)) < 0.001
    close(out, alone(arch, rank), 0.3)
    as_good(tiny_model(arch), out, alone(arch, rank))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]


def test_experts(tmp_path: Path) -> None:
    source = write_mixture(tmp_path / "source", "qwen3_moe")
    convert(source, tmp_path / "one", **FEW)
    for count in (2, 3):
        out = tmp_path / f"by-{count}"
        together(count, source, out, **FEW)
        assert other_codes(out, tmp_path / "one") < 0.001
        close(out, tmp_path / "one", 0.2)
        as_good(source, out, tmp_path / "one")


def test_only_one_has_memory_to_keep_inputs_in(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares of the text differ in size."""
    monkeypatch.setattr(Passage, "_room", lambda self, *rest: self.world.leads)
    together(2, tiny_model(), tmp_path / "out", **FEW)
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("tune_samples", [8, 9])  # of 8 windows the last is one process's alone
def test_a_whole_model_tuned(tune_samples: int, tiny_model: Maker, tmp_path: Path) -> None:
    choices = {**FEW, "recipe": "max", "rank": 2, "tune": 2, "tune_samples": tune_samples}
    together(2, tiny_model(), tmp_path / "out", **choices)
    convert(tiny_model(), tmp_path / "one", **choices)
    as_good(tiny_model(), tmp_path / "out", tmp_path / "one")


def journal(out: Path) -> list[dict[str, Any]]:
    opened = Journal(out.with_name(out.name + ".partial") / "journal")
    opened.close()
    return opened.records


def test_killed_and_gone_on_with(tiny_model: Maker, tmp_path: Path) -> None:
    source, whole, out = tiny_model(), tmp_path / "whole", tmp_path / "out"
    together(2, source, whole, **LOW_RANK)
    real = Work._block

    def killed(world: World) -> None:
        def block(self: Work, index: int, tensors: dict[str, torch.Tensor]) -> Any:
            if index == 1 and world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, index, tensors)

        Work._block = block  # type: ignore[method-assign]  # of this process alone
        convert(source, out, world=world, **LOW_RANK)

    codes = processes.wait(processes.start(2, killed, tmp_path / "killed"), 30)
    assert codes == [2, -signal.SIGKILL]
    told = (tmp_path / "killed.0").read_text()
    assert "process 1 of 2" in told
    assert "goes on from what is done" in told
    done = [record["file"] for record in journal(out) if "file" in record]
    assert "text.safetensors" in done

    with pytest.raises(OutputError, match="processes was 2, is 1"):
        convert(source, out, **LOW_RANK)

    def with_three(world: World) -> None:
        convert(source, out, world=world, **LOW_RANK)

    assert processes.wait(processes.start(3, with_three, tmp_path / "three")) == [2, 2, 2]
    assert "processes was 2, is 3" in (tmp_path / "three.0").read_text()
    together(2, source, out, **LOW_RANK)
    assert contents(out) == contents(whole)
    assert not out.with_name("out.partial").exists()


def test_batches_shrink_everywhere(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory ends in one process, while it advances: the others have moved on already."""
    from zqfp_convert.conversion.states import States

    source, whole, out = tiny_model(), tmp_path / "whole", tmp_path / "out"
    together(2, source, whole, **FEW)
    tried: list[int] = []

    def work(world: World) -> None:
        real = States.advance

        def advance(self: States, *rest: Any) -> None:
            tried.append(self.size)
            if len(tried) == 2 and world.rank == 1:
                move = self.student.advance

                def fail(*rest: Any) -> None:
                    self.student.advance = move  # type: ignore[method-assign]
                    raise torch.OutOfMemoryError("too much")

                self.student.advance = fail  # type: ignore[method-assign]
            real(self, *rest)

        monkeypatch.setattr(States, "advance", advance)
        convert(source, out, world=world, **FEW)
        assert tried == [4, 4, 4, 2], tried  # block 0, 1, and both again

    processes.run(2, work, tmp_path / "log")
    close(out, whole, 0.2)


@pytest.mark.parametrize(
    ("samples", "words", "said"),
    [(1, 100, "samples: 1 for 2 processes"), (7, 3, "1 windows of text for 2 processes")],
)
def test_fewer_windows_than_processes(
    samples: int, words: int, said: str, tiny_model: Maker, tmp_path: Path
) -> None:
    source, text = tiny_model(), tmp_path / "text.txt"
    text.write_text("fox " * words)
    choices = {**FEW, "samples": samples, "seq_len": 8, "calibration": text}

    def work(world: World) -> None:
        with pytest.raises(OptionError, match=said):
            convert(source, tmp_path / "out", world=world, **choices)

    processes.run(2, work, tmp_path / "log")
    assert not (tmp_path / "out.partial").exists()


def test_a_mixture_is_tuned_by_one_process(tmp_path: Path) -> None:
    source = write_mixture(tmp_path / "source", "qwen3_moe")

    def work(world: World) -> None:
        with pytest.raises(OptionError, match="a mixture of experts, with 2 processes"):
            convert(source, tmp_path / "out", world=world, **{**FEW, "tune": 2})

    processes.run(2, work, tmp_path / "log")
    assert not (tmp_path / "out.partial").exists()
