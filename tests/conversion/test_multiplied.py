"""Conversions whose quantized blocks multiply as FP8 tensor cores do, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import QUICK, write_model, write_tokenizer
from torch import Tensor

import zqfp_convert
from zqfp_convert.errors import Stopped
from zqfp_convert.numerics import kernels
from zqfp_convert.runtime import resident
from zqfp_convert.runtime.resident import ResidentLinear

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no Triton")


def scaled_mm(
    codes: Tensor, matrix: Tensor, *, scale_a: Tensor, scale_b: Tensor, **how: Any
) -> Tensor:
    product = codes.float() @ matrix.float() * scale_a * scale_b
    return product.to(how["out_dtype"])


@pytest.mark.parametrize("arch", ["llama", "gpt2"])  # with and without biases
def test_quantized_blocks_on_tensor_cores(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zqfp_convert.runtime.kernels.portable import quantize

    model = write_model(tmp_path / "model", arch, torch.bfloat16)
    write_tokenizer(model)
    monkeypatch.setattr("zqfp_convert.conversion.block.compute_dtype", lambda *_: torch.bfloat16)

    def convert(out: str, progress: Any = None) -> tuple[dict[str, bytes], float]:
        found = zqfp_convert.convert(
            model, tmp_path / out, **{**QUICK, "rank": 4}, progress=progress
        )
        layers = json.loads((found.out / "zqfp_manifest.json").read_text())["layers"]
        files = {path.name: path.read_bytes() for path in found.out.glob("*.safetensors")}
        return files, sum(entry["output_error"] for entry in layers.values())

    _, dense = convert("dense")
    multiplied: list[int] = []
    forward = ResidentLinear.forward

    def counted(self: ResidentLinear, x: Tensor) -> Tensor:
        multiplied.append(self.rows)
        return forward(self, x)

    monkeypatch.setattr(ResidentLinear, "forward", counted)
    monkeypatch.setattr(resident, "available", lambda device: True)
    monkeypatch.setattr(quantize, "quantize", quantize.quantize_twin)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    want, error = convert("whole")
    assert multiplied
    assert error == pytest.approx(dense, rel=0.05)

    def stop(text: str, done: int, total: int) -> None:
        if text.startswith("block 2/"):
            raise KeyboardInterrupt

    with pytest.raises(Stopped):
        convert("stopped", stop)
    assert convert("stopped")[0] == want
