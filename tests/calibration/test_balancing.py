"""Outlier channels that compute nothing new are taken back, exactly, before anything is rounded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zqfp_convert
from zqfp_convert.calibration import folding
from zqfp_convert.calibration.stream import Call
from zqfp_convert.verify import verify

DEMO = Path(__file__).parents[2] / "zqfp_convert" / "demo" / "model"
SMALL = {"samples": 4, "seq_len": 64, "rank": 0, "device": "cpu", "tune_samples": 0}
SMALL |= {"rotation": "none"}  # which would do as well here


def blown_up(folder: Path) -> Path:
    """The demonstration model with three channels of every norm times 32."""
    shutil.copytree(DEMO, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("layernorm.weight")]:
        path = name.removesuffix("layernorm.weight")
        attention = path.endswith("input_")
        block = path.rsplit(".", 1)[0]
        readers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        for reader in readers if attention else ("mlp.gate_proj", "mlp.up_proj"):
            tensors[f"{block}.{reader}.weight"][:, [1, 20, 37]] /= 32
        tensors[name][[1, 20, 37]] *= 32
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def errors(folder: Path) -> dict[str, float]:
    manifest = json.loads((folder / "zqfp_manifest.json").read_text())
    return {name: entry["output_error"] for name, entry in manifest["layers"].items()}


def test_a_blown_up_model_converts_as_well(tmp_path: Path) -> None:
    source = blown_up(tmp_path / "source")
    plain = zqfp_convert.convert(DEMO, tmp_path / "plain", **SMALL)
    balanced = zqfp_convert.convert(source, tmp_path / "balanced", **SMALL)
    left = zqfp_convert.convert(source, tmp_path / "left", balance_norms=False, **SMALL)
    assert not any("balanced" in entry for entry in plain.layers.values())
    behind = [name for name, entry in balanced.layers.items() if "balanced" in entry]
    assert len(behind) > 0.6 * len(balanced.layers)  # all but what no norm is before
    assert set(balanced.changed.values()) == {"norm_changed"}
    want, have, worse = errors(plain.out), errors(balanced.out), errors(left.out)
    total = [sum(one[name] for name in behind) for one in (want, have, worse)]
    assert total[1] < 1.05 * total[0] < 0.9 * total[2]
    assert len(verify(balanced.out, source).errors) == len(balanced.layers)
    model = zqfp_convert.load(balanced.out, device="cpu")
    with torch.no_grad():
        assert model(torch.arange(20)[None]).logits.isfinite().all()


def test_what_is_only_called_a_norm_is_left_alone() -> None:
    class PairNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.weight, x

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = PairNorm(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(self.norm(x)[0])
            return y

    block = Block()
    norms = folding.norms_of(block, "Norm", "weight")
    assert norms == {"norm": block.norm}
    found = folding.consumers(block, norms, {"linear"}, Call((), {}), torch.randn(1, 2, 4))
    assert found == {"norm": []}


def test_tuned_norms_are_still_those_of_the_source(tmp_path: Path) -> None:
    source = blown_up(tmp_path / "source")
    made = zqfp_convert.convert(source, tmp_path / "out", tune=2, **SMALL)
    assert any("balanced" in entry for entry in made.layers.values())
    assert len(verify(made.out, source).errors) == len(made.layers)


def test_another_model_is_not_taken_for_the_source(tmp_path: Path) -> None:
    source = blown_up(tmp_path / "source")
    made = zqfp_convert.convert(source, tmp_path / "out", **SMALL)
    norm = next(entry["balanced"] for entry in made.layers.values() if "balanced" in entry)
    tensors = load_file(source / "model.safetensors")
    tensors[norm][1] *= 2
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(zqfp_convert.errors.ZqfpError):
        verify(made.out, source)
