"""Tensors that are made of others look as if they lay so on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from zqfp_convert.checkpoint.shards import Shards
from zqfp_convert.checkpoint.source.merged import Merge, MergedShards


def joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts)


def lower(parts: list[Tensor]) -> Tensor:
    return parts[0].chunk(2)[1]


@pytest.fixture
def shards(tmp_path: Path) -> MergedShards:
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.full((1, 3), 7.0),
        "both": torch.arange(8.0).view(4, 2).bfloat16(),
        "other": torch.ones(5),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    merges = {"ab": Merge(("a", "b"), joined), "second": Merge(("both",), lower)}
    return MergedShards(Shards.open(tmp_path), merges)


def test_what_there_is(shards: MergedShards) -> None:
    assert shards.tensors.keys() == {"ab", "second", "other"}
    assert shards.tensors["ab"].shape == (3, 3)
    assert shards.tensors["ab"].bytes == 36
    assert (shards.tensors["second"].dtype, shards.tensors["second"].shape) == ("BF16", (2, 2))
    assert shards.stored_bytes == 24 + 12 + 16 + 20


def test_read(shards: MergedShards) -> None:
    found = shards.read(["second", "ab", "other"])
    assert list(found) == ["second", "ab", "other"]
    assert found["ab"].tolist() == [[0, 1, 2], [3, 4, 5], [7, 7, 7]]
    assert found["second"].tolist() == [[4, 5], [6, 7]]
    assert found["second"].is_contiguous()
    assert [piece.tolist() for piece in shards.pieces("ab", 24)] == [[0, 1, 2, 3, 4, 5], [7, 7, 7]]
    assert shards.read_at("ab", 2).tolist() == [7, 7, 7]
    assert shards.read_at("other", 2) == 1
