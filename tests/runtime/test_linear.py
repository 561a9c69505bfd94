"""The quantized linear layer: what it computes, which way, and that casts leave it packed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from dequantized import Dense, lorc_of, weight_of
from packed_layers import random_layer
from torch import Tensor, nn

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.errors import OptionError
from zqfp_convert.numerics.scales import Kind
from zqfp_convert.runtime import expanded
from zqfp_convert.runtime.linear import PATH_VARIABLE, QuantizedLinear, Scratch


def truth(layer: PackedLayer, bias: Tensor | None = None) -> Dense:
    weight = weight_of(layer.tensors(), layer.name, layer.columns, layer.group_size)
    return Dense(weight, lorc_of(layer.tensors(), layer.name), bias)


def relative(have: Tensor, want: Tensor) -> float:
    return float((have.double() - want).norm() / want.norm())


@pytest.mark.parametrize("kind", ["free", "m1", "m2"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 33), (32, 64), (21, 45)])
@pytest.mark.parametrize("group_size", [16, 32, 128])
@pytest.mark.parametrize("rank", [0, 3])
def test_reference(kind: Kind, rows: int, columns: int, group_size: int, rank: int) -> None:
    layer = random_layer(kind, rows, columns, group_size, rank)
    for bias in (None, torch.randn(rows)):
        module = QuantizedLinear(layer, bias, Scratch())
        x = torch.randn(6, columns)
        assert module.path(x) == "reference"
        assert relative(module(x), truth(layer, bias)(x)) < 1e-6


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (1, 2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = random_layer("m2", 21, 45, rank=2)
    bias = torch.randn(21, dtype=dtype)
    x = torch.randn(*shape, 45).to(dtype)
    y = QuantizedLinear(layer, bias, Scratch())(x)
    assert y.shape == (*shape, 21)
    assert y.dtype == dtype
    if y.numel():
        limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
        assert relative(y, truth(layer, bias)(x)) < limit


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    module = QuantizedLinear(random_layer("m2", 21, 45), None, Scratch())
    x = torch.randn(5, 45)
    louder = torch.cat([x, 1e4 * torch.randn(1, 45)])
    torch.testing.assert_close(module(louder)[:5], module(x))


def test_input_offset() -> None:
    layer = random_layer("m2", 21, 45)
    offset = torch.randn(45).bfloat16()
    moved = copy.copy(layer)
    object.__setattr__(moved, "input_offset", offset)
    bias, x = torch.randn(21), torch.randn(6, 45)
    have = QuantizedLinear(moved, bias, Scratch())(x)
    assert relative(have, truth(layer, bias)(x - offset.float())) < 1e-6


def test_not_a_number_goes_through() -> None:
    module = QuantizedLinear(random_layer("m2", 21, 45), None, Scratch())
    x = torch.randn(4, 45)
    x[1, 3], x[2, 4] = float("nan"), float("inf")
    y = module(x)
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    assert y[[0, 3]].isfinite().all()


def test_tokens_of_zeros() -> None:
    bias = torch.randn(21)
    y = QuantizedLinear(random_layer("m2", 21, 45, rank=2), bias, Scratch())(torch.zeros(3, 45))
    assert torch.equal(y, bias.expand(3, 21))


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "float": lambda module: module.float(),
    "to": lambda module: module.to(torch.float16),
    "to both": lambda module: module.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_packed_tensors_alone(cast: str) -> None:
    layer = random_layer("m2", 21, 45, rank=2)
    model = nn.ModuleDict(
        {"q": QuantizedLinear(layer, torch.randn(21), Scratch()), "norm": nn.LayerNorm(21)}
    )
    before = {name: tensor.clone() for name, tensor in model.q.state_dict().items()}
    norm = copy.deepcopy(model.norm)
    CASTS[cast](model)
    CASTS[cast](norm)
    assert model.norm.weight.dtype == norm.weight.dtype
    for name, tensor in model.q.state_dict().items():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    assert (
        relative(model.q(torch.ones(1, 45)), truth(layer, model.q.bias)(torch.ones(1, 45))) < 1e-6
    )


def test_moves_between_devices() -> None:
    module = QuantizedLinear(random_layer("m2", 21, 45, rank=2), torch.ones(21), Scratch())
    module.to("meta")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}


def test_names_are_those_on_disk() -> None:
    layer = random_layer("m2", rank=2)
    module = QuantizedLinear(layer, torch.ones(layer.rows), Scratch())
    names = {name.removeprefix("layer.") for name in layer.tensors()} | {"bias"}
    assert module.state_dict().keys() == names
    assert not list(module.parameters())
    assert module.packed().tensors().keys() == layer.tensors().keys()
    assert (module.in_features, module.out_features) == (layer.columns, layer.rows)
    assert "rank=2" in repr(module)
    assert "m2" in repr(module)


@pytest.fixture
def fp8_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This device as if it had FP8 tensor cores."""
    monkeypatch.setattr(expanded, "available", lambda device: True)

    def multiply(a: Tensor, b: Tensor, **settings: Tensor) -> Tensor:
        product = (a.float() @ b.float()) * settings["scale_a"] * settings["scale_b"]
        return product.to(torch.bfloat16)

    monkeypatch.setattr(torch, "_scaled_mm", multiply)


@pytest.mark.usefixtures("fp8_gpu")
@pytest.mark.parametrize(
    ("kind", "dtype", "want"),
    [
        ("m2", torch.bfloat16, "expanded"),
        ("m1", torch.float16, "expanded"),
        ("m2", torch.float32, "reference"),
        ("free", torch.bfloat16, "reference"),
    ],
)
def test_the_way_is_chosen(
    kind: Kind, dtype: torch.dtype, want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = QuantizedLinear(random_layer(kind), None, Scratch())
    x = torch.randn(3, 72).to(dtype)
    assert module.path(x) == want
    monkeypatch.setenv(PATH_VARIABLE, "reference")
    assert module.path(x) == "reference"
    monkeypatch.setenv(PATH_VARIABLE, "expanded")
    if want == "expanded":
        assert module.path(x) == "expanded"
    else:
        with pytest.raises(OptionError) as raised:
            module(x)
        assert raised.value.where == "ZQFP_PATH=expanded"
        assert str(dtype) in raised.value.found


@pytest.mark.usefixtures("fp8_gpu")
def test_expanded_with_one_scratch_for_all() -> None:
    scratch = Scratch()
    layers = [random_layer("m2", *shape, rank=2) for shape in ((21, 45), (64, 160), (3, 7))]
    for layer in (*layers, *layers):
        bias, x = torch.randn(layer.rows), torch.randn(5, layer.columns).bfloat16()
        module = QuantizedLinear(layer, bias, scratch)
        assert module.path(x) == "expanded"
        assert relative(module(x), truth(layer, bias)(x)) < 8e-3
    device = torch.device("cpu")
    large, small = scratch.matrix(64, 160, device), scratch.matrix(16, 16, device)
    assert small.data_ptr() == large.data_ptr()
    assert small.shape == (16, 16)


@pytest.mark.parametrize(("path", "found"), [("expanded", "cpu"), ("fused9", "no such path")])
def test_a_path_that_cannot_be(path: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = QuantizedLinear(random_layer(), None, Scratch())
    monkeypatch.setenv(PATH_VARIABLE, path)
    with pytest.raises(OptionError) as raised:
        module(torch.randn(2, 72).bfloat16())
    assert raised.value.where == f"ZQFP_PATH={path}"
    assert found in raised.value.found
