"""Tensors read out of shards: every dtype, whole or a part, and files that do not hold them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from zqfp_convert.checkpoint.shards import DTYPES, Shards
from zqfp_convert.errors import CheckpointError


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_dtype_comes_as_it_was_written(tmp_path: Path) -> None:
    written = {name: torch.ones(3, 4).to(dtype) for name, dtype in DTYPES.items()}
    written["floats"] = torch.randn(3, 4)
    written["none"], written["scalar"] = torch.empty(0, 4), torch.tensor(3.5)
    save_file(written, tmp_path / "model.safetensors")
    shards = Shards.open(tmp_path)
    read = shards.read(written)
    for name, tensor in written.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert as_bytes(read[name]) == as_bytes(tensor)
        if len(tensor.shape) == 2 and len(tensor):
            assert as_bytes(shards.read_at(name, 2)) == as_bytes(tensor[2])
        for size in (16, 1 << 20):
            pieces = [(piece.dtype, as_bytes(piece)) for piece in shards.pieces(name, size)]
            assert b"".join(read for _, read in pieces) == as_bytes(tensor)
            assert all(dtype == tensor.dtype and len(read) <= size for dtype, read in pieces)


def test_a_file_that_was_cut_off_after_it_was_opened(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    shards = Shards.open(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(CheckpointError, match="ends within it") as caught:
        shards.read(["a"])
    assert caught.value.rule == "bad-shard"
    with pytest.raises(CheckpointError, match="ends within it"):
        list(shards.pieces("a", 64))
