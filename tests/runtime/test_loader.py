"""Loading a packed checkpoint as a transformers model."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import Maker, token_ids
from dequantized import manifest, read_tensors
from safetensors.torch import save_file
from torch import Tensor

import zqfp_convert
from zqfp_convert.checkpoint.source import hub
from zqfp_convert.errors import CheckpointError, OptionError, SourceError
from zqfp_convert.runtime.linear import QuantizedLinear


@pytest.fixture
def packed(converted: Maker, tmp_path: Path) -> Path:
    """A copy that can be spoiled."""
    return Path(shutil.copytree(converted("llama", "best"), tmp_path / "packed"))


@torch.no_grad()
def logits(folder: str | Path) -> Tensor:
    return zqfp_convert.load(folder, device="cpu")(token_ids()).logits


def write_shards(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """Lay the tensors of a checkpoint out anew, in so many shards."""
    for old in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        old.unlink()
    names = sorted(tensors)
    files = {
        "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors":
        names[i::shards]
        for i in range(shards)
    }  # fmt: skip
    notes = manifest(folder)
    notes["shards"] = {}
    for file, members in files.items():
        save_file({name: tensors[name].contiguous() for name in members}, folder / file)
        data = (folder / file).read_bytes()
        notes["shards"][file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "zqfp_manifest.json").write_text(json.dumps(notes))
    if shards > 1:
        index = {"weight_map": {name: file for file, names in files.items() for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_any_number_of_shards(shards: int, packed: Path) -> None:
    want = logits(packed)
    write_shards(packed, read_tensors(packed), shards)
    assert torch.equal(logits(packed), want)


def test_what_is_loaded(packed: Path) -> None:
    model = zqfp_convert.load(packed, device="cpu")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert sorted(layer.name for layer in quantized) == sorted(manifest(packed)["layers"])
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert {parameter.requires_grad for parameter in model.parameters()} == {False}
    assert quantized[0].weight_packed.dtype == torch.uint8
    scratches = {id(layer._scratch) for layer in quantized}
    assert len(scratches) == 1


def test_dtype(packed: Path) -> None:
    model = zqfp_convert.load(packed, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        have, want = model(token_ids()).logits, logits(packed)
    assert have.dtype == torch.bfloat16
    assert (have.float() - want).norm() < 0.1 * want.norm()


def test_from_the_hub(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: str(packed))
    assert torch.equal(logits("someone/model"), logits(packed))


@pytest.mark.parametrize("device", ["cuda:7", "mps:3", "nonsense"])
def test_no_such_device(device: str, packed: Path) -> None:
    with pytest.raises(OptionError) as raised:
        zqfp_convert.load(packed, device=device)
    assert raised.value.where == "device"
    assert device in raised.value.found


def test_not_a_packed_checkpoint(tiny_model: Maker) -> None:
    with pytest.raises(CheckpointError, match="zqfp") as raised:
        zqfp_convert.load(tiny_model("llama"), device="cpu")
    assert raised.value.rule == "bad-config"
    with pytest.raises(SourceError, match="no such folder"):
        zqfp_convert.load("./no-such-folder", device="cpu")


def test_a_tensor_that_the_model_needs_is_missing(packed: Path) -> None:
    tensors = read_tensors(packed)
    del tensors["model.norm.weight"]
    write_shards(packed, tensors, 1)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight") as raised:
        zqfp_convert.load(packed, device="cpu")
    assert raised.value.rule == "missing-tensor"


def test_another_model_than_its_configuration(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no place in the model"):
        zqfp_convert.load(packed, device="cpu")


def test_a_shape_that_the_model_does_not_have(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["intermediate_size"] = 96
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj"):
        zqfp_convert.load(packed, device="cpu")


LOAD = """
import sys
import zqfp_convert
assert "torch" not in sys.modules, "zqfp_convert alone imports torch"
model = zqfp_convert.load(sys.argv[1], device="cpu")
model.generate(max_new_tokens=2, do_sample=False)
rooms = ("conversion", "plan", "quantize", "calibration", "evaluate", "cli", "demo", "verify")
found = [m for m in sys.modules if m.startswith(tuple(f"zqfp_convert.{r}" for r in rooms))]
assert not found, found
"""


def test_it_does_not_pull_in_the_converter(packed: Path) -> None:
    command = [sys.executable, "-c", LOAD, str(packed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
