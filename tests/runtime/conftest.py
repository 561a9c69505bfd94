"""GPU kernels where there is no GPU: Triton's in its interpreter, Hopper's as twins in torch."""

from __future__ import annotations

import os
from types import SimpleNamespace

import hopper_twins
import pytest
import torch

from zqfp_convert.runtime import expanded, paths
from zqfp_convert.runtime.kernels.hopper import decode, fused, schedules
from zqfp_convert.runtime.kernels.hopper import linear as hopper_linear
from zqfp_convert.runtime.kernels.hopper.multiply import Schedule


@pytest.fixture
def scaled_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch._scaled_mm` with row-wise scales, computed in float64."""
    monkeypatch.setattr(torch, "_scaled_mm", hopper_twins.scaled_mm)


@pytest.fixture(params=["hopper", "portable", "torch"])
def kernels(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, scaled_mm: None
) -> str:
    """This CPU as if it were a GPU with these kernels (`paths.Kernels`)."""
    chosen: str = request.param
    if chosen == "portable":
        if not paths.portable.available():
            pytest.skip("no Triton, or one that is too old")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton's kernels run on the GPU here: test_gpu.py")
    choose = paths.kernels_for

    def kernels_for(device: torch.device, *about: object) -> str:
        if device.type != "cpu":
            return choose(device, *about)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(expanded, "available", lambda device: True)
            patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
            patch.setattr(paths.hopper, "available", lambda: chosen == "hopper")
            patch.setattr(paths.portable, "available", lambda: chosen == "portable")
            return choose(torch.device("cuda", 0), *about)

    monkeypatch.setattr(paths, "kernels_for", kernels_for)
    monkeypatch.setattr(schedules, "choose", lambda *about: Schedule(8))
    monkeypatch.setattr(schedules, "decodes", lambda tokens, *about: tokens <= 4)
    monkeypatch.setattr(schedules, "prefers_expanded", lambda *about: False)
    processors = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: processors)
    for module in (fused, hopper_linear):
        monkeypatch.setattr(module, "quantize", hopper_twins.quantize)
    monkeypatch.setattr(fused, "multiply", hopper_twins.multiply)
    monkeypatch.setattr(decode, "decode", hopper_twins.decode)
    monkeypatch.setattr(hopper_linear, "expand", hopper_twins.expand)
    return chosen
