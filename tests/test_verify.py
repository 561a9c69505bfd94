"""What `verify` proves, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import zqfp_convert
from zqfp_convert.errors import CheckpointError
from zqfp_convert.verify import verify

Maker = Callable[..., Path]


def rewrite(out: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change the tensors of the last shard, and index and manifest with them."""
    manifest = json.loads((out / "zqfp_manifest.json").read_text())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for file in list(manifest["shards"]):
        tensors = load_file(out / file)
        before = set(tensors)
        change(tensors)
        for name in before - set(tensors):
            del index["weight_map"][name]
        index["weight_map"] |= dict.fromkeys(tensors, file)
        save_file(tensors, out / file)
        data = (out / file).read_bytes()
        manifest["shards"][file] = {
            "size": len(data), "sha256": hashlib.sha256(data).hexdigest()
        }  # fmt: skip
    (out / "zqfp_manifest.json").write_text(json.dumps(manifest))
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("scales", ["m1", "m2", "free"])
def test_a_sound_checkpoint(tiny_model: Maker, tmp_path: Path, arch: str, scales: str) -> None:
    made = zqfp_convert.convert(
        tiny_model(arch), tmp_path / "out", recipe="fast", scales=scales, rank=2, device="cpu"
    )
    proved = verify(tmp_path / "out", tiny_model(arch))
    assert proved.layers == len(made.layers) == len(proved.errors)
    assert proved.exact is (scales != "free")
    assert proved.groups > proved.layers
    for name, error in proved.errors.items():
        assert error == pytest.approx(made.layers[name]["weight_error"], rel=1e-4)
    assert proved.unchanged > 0


def test_another_model(tiny_model: Maker, tmp_path: Path) -> None:
    zqfp_convert.convert(tiny_model("llama"), tmp_path / "out", recipe="fast", device="cpu")
    with pytest.raises(CheckpointError, match="compared with the model"):
        verify(tmp_path / "out", tiny_model("mistral"))


def test_a_lost_tensor(tiny_model: Maker, tmp_path: Path) -> None:
    zqfp_convert.convert(tiny_model("llama"), tmp_path / "out", recipe="fast", device="cpu")
    rewrite(tmp_path / "out", lambda tensors: tensors.pop("model.norm.weight", None))
    verify(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*lacks"):
        verify(tmp_path / "out", tiny_model("llama"))


def test_a_changed_tensor(tiny_model: Maker, tmp_path: Path) -> None:
    zqfp_convert.convert(tiny_model("llama"), tmp_path / "out", recipe="fast", device="cpu")

    def change(tensors: dict[str, object]) -> None:
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1  # type: ignore[operator]

    rewrite(tmp_path / "out", change)
    with pytest.raises(CheckpointError, match="another value"):
        verify(tmp_path / "out", tiny_model("llama"))
