"""The package reads the format's own test vectors: the same bits, the same broken rules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.errors import CheckpointError
from zqfp_convert.numerics import fp8

VECTORS = Path(__file__).parents[2] / "formats" / "vectors"
VALID = sorted(path.name for path in (VECTORS / "valid").iterdir())
INVALID = sorted(path.name for path in (VECTORS / "invalid").iterdir())


def bits(hexadecimal: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(hexadecimal), dtype="<u4")


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().contiguous().numpy().reshape(-1).view("<u4")


@pytest.mark.parametrize("case", VALID)
def test_valid(case: str) -> None:
    folder = VECTORS / "valid" / case
    expected = json.loads((folder / "expected.json").read_text())["layers"]
    checkpoint = PackedCheckpoint(folder, check_hashes=True)
    assert checkpoint.layers == sorted(expected)
    for name, want in expected.items():
        layer = checkpoint.layer(name)
        assert (bits_of(layer.dequantize()) == bits(want["weight"])).all()
        assert layer.scales().span == want["span"]
        assert layer.bits == 8 * want["bytes"] / (layer.rows * layer.columns)
        if want["lorc"] is None:
            assert layer.lorc_A is None
        else:
            assert layer.lorc_A is not None
            assert layer.lorc_B is not None
            assert (bits_of(layer.lorc_A) == bits(want["lorc"]["A"])).all()
            assert (bits_of(layer.lorc_B) == bits(want["lorc"]["B"])).all()
            scale = layer.lorc_scale
            scale = torch.ones(layer.rank) if scale is None else scale
            assert (bits_of(scale) == bits(want["lorc"]["s"])).all()
        if want["input_offset"] is None:
            assert layer.input_offset is None
        else:
            assert layer.input_offset is not None
            assert (bits_of(layer.input_offset) == bits(want["input_offset"])).all()


@pytest.mark.parametrize("case", INVALID)
def test_invalid(case: str) -> None:
    folder = VECTORS / "invalid" / case
    rule = json.loads((folder / "error.json").read_text())["rule"]
    with pytest.raises(CheckpointError) as raised:
        checkpoint = PackedCheckpoint(folder, check_hashes=True)
        for name in checkpoint.layers:
            checkpoint.layer(name)
    assert raised.value.rule == rule
    assert raised.value.needed
    assert raised.value.do


def test_activations() -> None:
    rows = json.loads((VECTORS / "activations.json").read_text())
    rows = rows["rows"] if isinstance(rows, dict) else rows
    for row in rows:
        x = torch.from_numpy(bits(row["x"]).view("<f4").copy())
        codes, scale = fp8.quantize(x)
        want = np.frombuffer(bytes.fromhex(row["codes"]), dtype=np.uint8)
        have = codes.view(torch.uint8).numpy()
        nan = (want & 0x7F) == 0x7F
        assert (((have & 0x7F) == 0x7F) == nan).all()
        assert (have[~nan] == want[~nan]).all()
        if np.isnan(bits(row["scale"]).view("<f4")).all():
            assert bool(scale.isnan().all())
        else:
            assert (bits_of(scale) == bits(row["scale"])).all()
