"""What the plan says of the memory that calibration text takes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import Maker, write_model, write_tokenizer

from zqfp_convert.calibration.text import reading_bytes
from zqfp_convert.plan import make_plan, memory
from zqfp_convert.plan.plan import Plan
from zqfp_convert.recipe import Recipe


@pytest.fixture
def text(tmp_path: Path) -> Path:
    found = tmp_path / "text.txt"
    found.write_text("the quick brown fox jumps over the lazy dog; " * 400)
    return found


def planned(model: Path, text: Path, recipe: str, rotation: str = "none") -> Plan:
    choices = {} if recipe == "fast" else {"samples": 4, "seq_len": 32, "rotation": rotation}
    chosen = Recipe.named(recipe, **choices)
    return make_plan(model, model.parent / "out", recipe=chosen, calibration=text, device="cpu")


def test_reading_text_is_counted(tiny_model: Maker, text: Path) -> None:
    """For a tiny model it takes the most."""
    model = tiny_model()
    tokenizer = (model / "tokenizer.json").stat().st_size
    least = memory.ALWAYS + memory.TOKENIZER * tokenizer + reading_bytes(4, 32, 0)
    host = planned(model, text, "best").host_memory
    assert least < host < least + (1 << 20)
    assert planned(model, text, "fast").host_memory < host  # does without the text


def test_reading_takes_no_more_for_a_longer_text(tiny_model: Maker, text: Path) -> None:
    host = planned(tiny_model(), text, "best").host_memory
    text.write_text(text.read_text() * 100)
    assert planned(tiny_model(), text, "best").host_memory == host


def test_a_larger_tokenizer_takes_more(tiny_model: Maker, text: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    host = planned(model, text, "best").host_memory
    with (model / "tokenizer.json").open("a") as file:
        file.write(" " * 1_000_000)
    assert planned(model, text, "best").host_memory == host + memory.TOKENIZER * 1_000_000


def test_comparing_a_rotated_model_takes_the_logits_of_both(tmp_path: Path, text: Path) -> None:
    model = write_model(tmp_path / "model", "llama", vocab_size=40_000)
    write_tokenizer(model)
    still, turned = (planned(model, text, "best", way) for way in ("none", "auto"))
    assert turned.host_memory - still.host_memory > 3 * 4 * 4 * 32 * 40_000
    assert turned.host_memory > 5 * 4 * 4 * 32 * 40_000


def test_a_batch_takes_what_something_else_takes(tmp_path: Path, text: Path) -> None:
    """On a GPU: what solving does, or what turning a large embedding does before."""
    model = write_model(tmp_path / "model", "llama", torch.bfloat16, vocab_size=40_000)
    write_tokenizer(model)
    still, turned = (
        replace(planned(model, text, "best", way), device=torch.device("cuda"))
        for way in ("none", "auto")
    )
    still = replace(still, device_memory=memory.peaks(still)[1])
    turned = replace(turned, device_memory=memory.peaks(turned)[1])
    assert memory.batch_bytes(still) == memory.solving_bytes(still)
    more = turned.device_memory - still.device_memory
    assert more > 0
    assert memory.batch_bytes(turned) == memory.batch_bytes(still) + more


def test_windows_take_memory() -> None:
    """Four bytes for each token that they are drawn from, eight for each of theirs."""
    assert reading_bytes(10, 100, 0) < reading_bytes(128, 2048, 0) < 20 << 20
    more = reading_bytes(1280, 2048, 0) - reading_bytes(128, 2048, 0)
    assert more == (4 * 4 + 8) * (1280 - 128) * 2048
    assert reading_bytes(4, 2048, 1000) > reading_bytes(4, 2048, 0) + 8 * 1000 * 2048


def test_rounding_on_a_gpu_takes_blocks_or_what_lies_outside(tmp_path: Path, text: Path) -> None:
    """Two blocks, as the next one is read meanwhile; or one tensor at a time."""
    small, large = (
        planned(write_model(tmp_path / str(size), "llama", vocab_size=size), text, "fast")
        for size in (40, 40_000)
    )
    gpu = torch.device("cuda")
    held, table = small.source.shards.tensors, "model.embed_tokens.weight"
    blocks = sum(held[name].bytes for index in (0, 1) for name in small.block_tensors(index))
    assert blocks < memory.peaks(replace(small, device=gpu))[1] < 8 * blocks
    outside = large.source.shards.tensors[table].bytes
    assert memory.peaks(replace(large, device=gpu))[1] == outside


def test_blocks_wait_for_larger_shards_alone(tmp_path: Path, text: Path) -> None:
    """One that takes long to write; of several processes none waits, as it could be lost."""
    small, large = (
        planned(write_model(tmp_path / str(size), "llama", vocab_size=size), text, "fast")
        for size in (40, 40_000)
    )
    shared = replace(large, processes=2)
    assert [memory.blocks_waiting(plan) for plan in (small, large, shared)] == [0, 2, 0]
    packed = sum(layer.packed_bytes for layer in large.layers[0])
    kept = memory.peaks(large)[0] - memory.peaks(shared)[0]
    assert packed <= kept < 1.1 * packed + 4096  # of two blocks one, and its norms
