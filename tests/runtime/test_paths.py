"""Which kernels a layer gets on a device, and which way a call goes."""

from __future__ import annotations

import warnings

import pytest
import torch

from zqfp_convert.errors import OptionError
from zqfp_convert.numerics.scales import Kind
from zqfp_convert.runtime import paths
from zqfp_convert.runtime.paths import Kernels, Path

CUDA = torch.device("cuda", 0)


class Machine:
    """What there is, as far as `paths` asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capability, self.nvrtc, self.triton = (9, 0), True, True
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(paths.hopper, "available", lambda: self.nvrtc)
        monkeypatch.setattr(paths.portable, "available", lambda: self.triton)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    paths._warn_without_fp8.cache_clear()
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("capability", "nvrtc", "triton", "want"),
    [
        ((9, 0), True, True, "hopper"),
        ((9, 0), True, False, "hopper"),
        ((9, 0), False, True, "portable"),
        ((9, 0), False, False, "torch"),
        ((8, 9), True, True, "portable"),
        ((8, 9), True, False, "torch"),
        ((10, 0), True, True, "portable"),
        ((12, 0), True, True, "portable"),
        ((12, 0), False, False, "torch"),
    ],
)
def test_kernels_of_a_gpu(
    capability: tuple[int, int], nvrtc: bool, triton: bool, want: Kernels, machine: Machine
) -> None:
    machine.capability, machine.nvrtc, machine.triton = capability, nvrtc, triton
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paths.kernels_for(CUDA, "m2", 128, 4096, 8) == want


@pytest.mark.parametrize(
    ("kind", "group_size", "columns", "rank", "want"),
    [
        ("m1", 32, 4096, 0, "hopper"),
        ("m2", 96, 4096, 0, "hopper"),
        ("m2", 4097, 4097, 0, "hopper"),
        ("m2", 16, 4096, 0, "torch"),
        ("m2", 48, 4096, 0, "torch"),
        ("m2", 128, 4096, 40, "hopper"),
        ("m2", 128, 4096, 41, "torch"),
        ("free", 128, 4096, 0, "none"),
    ],
)
def test_kernels_of_a_layer(
    kind: Kind, group_size: int, columns: int, rank: int, want: Kernels, machine: Machine
) -> None:
    assert paths.kernels_for(CUDA, kind, group_size, columns, rank) == want


def test_ranks_of_the_portable_kernels(machine: Machine) -> None:
    machine.capability = (8, 9)
    assert paths.kernels_for(CUDA, "m2", 128, 4096, 32) == "portable"
    assert paths.kernels_for(CUDA, "m2", 128, 4096, 33) == "torch"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6)])
def test_a_gpu_without_fp8_warns_once(capability: tuple[int, int], machine: Machine) -> None:
    machine.capability = capability
    with pytest.warns(UserWarning, match=r"a GPU has no FP8 .* reference path"):
        assert paths.kernels_for(CUDA, "m2", 128, 4096, 8) == "none"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paths.kernels_for(CUDA, "m2", 128, 4096, 8) == "none"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices_have_none_and_no_warning(device: str, machine: Machine) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paths.kernels_for(torch.device(device), "m2", 128, 4096, 8) == "none"


WAYS: dict[Kernels, tuple[Path, ...]] = {
    "hopper": ("fused", "expanded", "reference"),
    "portable": ("fused", "expanded", "reference"),
    "torch": ("expanded", "reference"),
    "none": ("reference",),
}


@pytest.mark.parametrize("kernels", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("forced", ["fused", "expanded", "reference", None])
def test_ways(
    kernels: Kernels, dtype: torch.dtype, forced: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.ones(2, 3, dtype=dtype)
    possible = WAYS[kernels] if dtype.itemsize == 2 else ("reference",)
    if forced is None:
        monkeypatch.delenv(paths.PATH_VARIABLE, raising=False)
        want = "auto" if "fused" in possible else possible[0]
        assert paths.wanted(kernels, x, "about") == want
        return
    monkeypatch.setenv(paths.PATH_VARIABLE, forced)
    if forced in possible:
        assert paths.wanted(kernels, x, "about") == forced
        return
    with pytest.raises(OptionError) as raised:
        paths.wanted(kernels, x, "about")
    assert raised.value.where == f"ZQFP_PATH={forced}"
    assert raised.value.found == f"about, {dtype} on cpu"
    assert "FP8" in raised.value.needed
    assert ("Triton" in raised.value.needed) == (forced == "fused")


def test_no_such_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(paths.PATH_VARIABLE, "faster")
    with pytest.raises(OptionError, match="no such path; needed: fused, expanded or reference"):
        paths.wanted("hopper", torch.ones(1).bfloat16(), "about")


def test_the_variable_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1).bfloat16()
    for path in ("fused", "reference", "expanded"):
        monkeypatch.setenv(paths.PATH_VARIABLE, path)
        assert paths.wanted("hopper", x, "about") == path
    monkeypatch.delenv(paths.PATH_VARIABLE)
    assert paths.wanted("hopper", x, "about") == "auto"
