"""Hidden states move on within a block where, and only where, nothing changes by it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, configuration, random_model, token_ids, write_model
from mixtures import QUICK, write_mixture

import zqfp_convert
from zqfp_convert.calibration.halfway import halfway, shortcut
from zqfp_convert.calibration.stages import trace
from zqfp_convert.calibration.stream import Entrance, Stream
from zqfp_convert.conversion import passage
from zqfp_convert.model.blocks import find_blocks, linears

# Attention and feed-forward start from the same states, or attention adds the states by itself.
NOWHERE = {"gpt_neox", "falcon", "cohere", "bloom"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_the_rest_of_a_block_makes_the_same_of_states_that_have_moved(arch: str) -> None:
    blocks = find_blocks(random_model(configuration(arch)))
    entrance = Entrance(blocks, [token_ids()])
    stream, call, block = Stream(entrance.first()), entrance.calls(0)(0), blocks.modules[0]
    stages = trace(block, [name for name, _ in linears(block)], call, stream.hidden[0])
    made = call.run(block, stream.hidden[0])
    done = [name for stage in stages[:2] for name in stage]
    left = [name for stage in stages[2:] for name in stage]
    place = halfway(block, done, left, call, stream.hidden[0])
    assert (place is None) == (arch in NOWHERE)
    assert halfway(block, [], list(dict(linears(block))), call, stream.hidden[0]) is None
    assert halfway(block, stages[0], [*stages[1], *left], call, stream.hidden[0]) is None
    assert shortcut(place, block, stages[0], call, stream.hidden[0]) is None if place else True
    if place is not None:
        assert shortcut(place, block, stages[1], call, stream.hidden[0]) is not None
        with place.moves(block, stream, 0):
            call.run(block, stream.hidden[0])
        place.leave(block)
        assert torch.equal(call.run(block, stream.hidden[0]), made)
        assert not any(name in dict(linears(block)) for name in done)


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_a_conversion_has_the_same_bytes_without(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model", arch)
    moved, shorter = [], []

    def watched(*args: object) -> object:
        moved.append(halfway(*args))  # type: ignore[arg-type]
        return moved[-1]

    def watched_too(*args: object) -> object:
        shorter.append(shortcut(*args))  # type: ignore[arg-type]
        return shorter[-1]

    hashes = []
    for name, place, way in (
        ("both", watched, watched_too),
        ("a place", watched, lambda *args: None),
        ("nothing", lambda *args: None, None),
    ):
        monkeypatch.setattr(passage, "halfway", place)
        monkeypatch.setattr(passage, "shortcut", way)
        monkeypatch.setattr(passage.Passage, "_room", lambda *args: True)
        out = tmp_path / name
        zqfp_convert.convert(tmp_path / "model", out, samples=4, seq_len=16, rank=2)
        files = sorted(out.glob("*.safetensors"))
        hashes.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert any(moved)
    assert any(shorter)
    assert not any(one.inputs for one in shorter if one)
    assert hashes[0] == hashes[1] == hashes[2]


@pytest.mark.parametrize(
    ("arch", "kept"),
    [("mixtral", False), ("qwen2_moe", True)],  # behind its experts are linears that all share
)
def test_inputs_before_experts_are_kept_where_they_are_used(
    arch: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_mixture(tmp_path / "model", arch)
    found, hashes = [], []

    def watched(*args: object) -> object:
        found.append(shortcut(*args))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(passage.Passage, "_room", lambda *args: True)
    for name, way in (("with", watched), ("without", lambda *args: None)):
        monkeypatch.setattr(passage, "shortcut", way)
        out = tmp_path / name
        zqfp_convert.convert(source, out, rank=2, **QUICK)
        files = sorted(out.glob("*.safetensors"))
        hashes.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert hashes[0] == hashes[1]
    assert bool(found) == kept
    assert all(one is not None and not one.inputs for one in found)
