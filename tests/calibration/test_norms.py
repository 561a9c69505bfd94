"""Fused norms: what a block's norms compute is found out, and done in one kernel."""

from __future__ import annotations

import pytest
import torch
from architectures import configuration, random_model, token_ids
from torch import Tensor, nn

from zqfp_convert.calibration.norms import FusedNorm, find_forms, fuse_norms, kinds
from zqfp_convert.calibration.stream import Call, Entrance
from zqfp_convert.model.blocks import find_blocks
from zqfp_convert.numerics import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = {"llama": "twice", "qwen3": "twice", "gemma3": "once, one more", "olmo2": "once"}


def block_of(arch: str) -> tuple[nn.Module, Call, Tensor]:
    model = random_model(configuration(arch)).to(DEVICE, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # no form shows with weights of one
            parameter.data += 0.3 * torch.randn_like(parameter)
    blocks = find_blocks(model)
    entrance = Entrance(blocks, [token_ids().to(DEVICE)])
    hidden = 3 * torch.randn_like(entrance.first()[0])
    return blocks.modules[0], entrance.calls(0)(0), hidden


@pytest.mark.parametrize("arch", FORMS)
@torch.no_grad()
def test_norms_are_fused_and_the_block_makes_the_same(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "take", lambda tensor: True)
    block, call, hidden = block_of(arch)
    want = call.run(block, hidden)
    forms = find_forms(block, call, hidden)
    assert set(forms.values()) == {FORMS[arch]}
    fuse_norms(block, forms)
    assert any(isinstance(module, FusedNorm) for module in block.modules())
    assert not kinds(block) & forms.keys()
    apart = (call.run(block, hidden).float() - want.float()).abs()
    assert float((apart > 0).float().mean()) < 0.05
    assert float(apart.norm() / want.float().norm()) < 1e-3


@pytest.mark.parametrize("arch", ["opt", "cohere"])
@torch.no_grad()
def test_other_norms_stay(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "take", lambda tensor: True)
    block, call, hidden = block_of(arch)
    forms = find_forms(block, call, hidden)
    assert not any(forms.values())
    before = [type(module) for module in block.modules()]
    fuse_norms(block, forms)
    assert [type(module) for module in block.modules()] == before


class _Half(nn.Module):
    """A share of a norm, which shows among its attributes as a plain number, or does not."""

    def __init__(self, size: int, share: float, *, shows: bool = False) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), 1e-6
        self.share = share if shows else (share,)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        share = self.share if isinstance(self.share, float) else self.share[0]
        return (share * wide).to(x.dtype) * self.weight.to(x.dtype)


@torch.no_grad()
def test_a_class_of_which_one_differs_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "take", lambda tensor: True)
    call, hidden = Call((), {}), torch.randn(2, 5, 64, device=DEVICE, dtype=torch.bfloat16)
    alike = nn.Sequential(_Half(64, 1.0), _Half(64, 1.0)).to(DEVICE)
    assert set(find_forms(alike, call, hidden).values()) == {"twice"}
    other = nn.Sequential(_Half(64, 1.0), _Half(64, 0.5)).to(DEVICE)
    assert set(find_forms(other, call, hidden).values()) == {None}
    told = nn.Sequential(_Half(64, 1.0, shows=True), _Half(64, 0.5, shows=True)).to(DEVICE)
    assert list(find_forms(told, call, hidden).values()) in (["twice", None], [None, "twice"])


@torch.no_grad()
def test_nothing_happens_on_the_cpu() -> None:
    block, call, hidden = block_of("llama")
    if DEVICE == "cpu":
        assert not any(find_forms(block, call, hidden).values())


@pytest.mark.parametrize("columns", [1, 40, 64, 1500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_against_float64(columns: int, dtype: torch.dtype) -> None:
    from zqfp_convert.numerics.kernels.norm import rms_norm

    values = torch.randn(3, 7, columns, device=DEVICE).to(dtype)
    values[1, 2] = 0
    weight = torch.randn(columns, device=DEVICE)
    wide = values.double()
    normal = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    bit = torch.finfo(dtype).eps
    for form, by, bits in (
        ("once", weight, 1),
        ("once, one more", 1 + weight, 1),
        ("twice", weight, 2),
    ):
        have = rms_norm(values, weight, 1e-6, form)
        assert have.dtype == dtype
        want = normal * by
        assert bool(((have - want).abs() <= bits * 0.51 * bit * want.abs() + 1e-7).all()), form
    strided = rms_norm(values.transpose(0, 1), weight, 1e-6, "once")
    assert torch.equal(strided, rms_norm(values, weight, 1e-6, "once").transpose(0, 1))


class _Roots(nn.Module):
    """A norm whose roots are a little off, as those of a GPU's library are."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), 1e-6

    def forward(self, x: Tensor, gate: None = None) -> Tensor:
        wide = x.float()
        wide = wide * (1.000005 * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps))
        return wide.to(x.dtype) * self.weight.to(x.dtype)


@torch.no_grad()
def test_two_units_of_the_last_place_are_no_other_form(monkeypatch: pytest.MonkeyPatch) -> None:
    from zqfp_convert.numerics.kernels.norm import rms_norm

    monkeypatch.setattr(kernels, "take", lambda tensor: True)
    torch.manual_seed(0)
    weight = (1 + 0.3 * torch.randn(256)).to(DEVICE)
    norm, call = nn.Sequential(_Roots(weight.bfloat16())), Call((), {})
    hidden = torch.randn(8, 64, 256, device=DEVICE, dtype=torch.bfloat16)
    want = norm(hidden).float()
    apart = (rms_norm(hidden, weight.bfloat16(), 1e-6, "twice").float() - want).abs()
    assert bool((apart > 2.0**-7 * want.abs()).any())  # else nothing is tried here
    assert set(find_forms(norm, call, hidden).values()) == {"twice"}


class _Block(nn.Module):
    """Calls its norm in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.norm, self.way = _Roots(torch.ones(64, dtype=torch.bfloat16)), way

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.norm(x.float()) if self.way == "wide" else self.norm(x, gate=None)
        return made


@pytest.mark.parametrize("way", ["wide", "keyword"])
@torch.no_grad()
def test_norms_that_are_called_otherwise_stay(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "take", lambda tensor: True)
    hidden = torch.randn(2, 5, 64, device=DEVICE, dtype=torch.bfloat16)
    block = _Block(way).to(DEVICE)
    assert set(find_forms(block, Call((), {}), hidden).values()) == {None}
