"""The quantized linear layer: what it computes, which way, and that casts leave it packed."""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable

import pytest
import torch
from dequantized import Dense, lorc_of, weight_of
from packed_layers import random_layer
from torch import Tensor, nn

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.errors import OptionError
from zqfp_convert.numerics import codebook
from zqfp_convert.numerics.scales import Kind
from zqfp_convert.runtime import siblings
from zqfp_convert.runtime.kernels.hopper import linear as hopper_linear
from zqfp_convert.runtime.kernels.hopper import schedules
from zqfp_convert.runtime.kernels.hopper.linear import HopperWeights
from zqfp_convert.runtime.linear import PATH_VARIABLE, QuantizedLinear, Scratch


def truth(layer: PackedLayer, bias: Tensor | None = None) -> Dense:
    size = layer.columns, layer.group_size
    weight = weight_of(layer.tensors(), layer.name, *size, layer.books)
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


SHAPES = [(21, 45, 32), (65, 300, 64), (130, 257, 128), (3, 7, 7), (40, 200, 48)]


@pytest.mark.parametrize("way", ["fused", "expanded"])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize("extras", ["", "bias", "lorc", "lorc bias offset"])
def test_fast_paths(
    kernels: str,
    way: str,
    rows: int,
    columns: int,
    group_size: int,
    extras: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind: Kind = "m1" if rows % 2 else "m2"
    layer = random_layer(kind, rows, columns, group_size, 11 if "lorc" in extras else 0)
    offset = torch.randn(columns).bfloat16() if "offset" in extras else None
    moved = dataclasses.replace(layer, input_offset=offset)
    bias = torch.randn(rows).half() if "bias" in extras else None
    module = QuantizedLinear(moved, bias, Scratch())
    monkeypatch.setenv(PATH_VARIABLE, way)
    for x in (torch.randn(5, columns).bfloat16(), torch.randn(2, 9, columns).bfloat16()):
        if way == "fused" and (kernels == "torch" or group_size == 48):
            with pytest.raises(OptionError, match="NVRTC or Triton"):
                module(x)
            continue
        assert module.path(x) == way
        y = module(x)
        assert y.shape == (*x.shape[:-1], rows)
        assert y.is_contiguous()
        seen = x.float() if offset is None else x.float() - offset.float()
        assert relative(y, truth(layer, bias)(seen)) < 4e-3


@pytest.mark.parametrize("way", ["auto", "fused", "expanded", "reference"])
@pytest.mark.parametrize("kind", ["m1", "m2"])
def test_two_codebooks(kernels: str, kind: Kind, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled too, and through a state dict."""
    layer = random_layer(kind, 40, 300, 32, 5, books=codebook.PAIR)
    module = QuantizedLinear(layer, None, Scratch())
    other = random_layer(kind, 40, 300, 32, 5, seed=1, books=codebook.PAIR)
    again = QuantizedLinear(other, None, Scratch())
    again.load_state_dict(module.state_dict())
    if way != "auto":
        monkeypatch.setenv(PATH_VARIABLE, way)
    x = torch.randn(7, 300).bfloat16()
    if way == "fused" and kernels == "torch":
        with pytest.raises(OptionError, match="NVRTC or Triton"):
            module(x)
        return
    auto = "expanded" if kernels == "torch" else "fused"
    assert module.path(x) == (auto if way == "auto" else way)
    want = truth(layer)(x.float())
    assert relative(module(x), want) < 4e-3
    assert torch.equal(again(x), module(x))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        assert relative(compiled(x), want) < 4e-3


@pytest.mark.parametrize("way", ["fused", "expanded"])
def test_inputs_of_any_layout(kernels: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "torch" and way == "fused":
        pytest.skip("there is no such path")
    layer = random_layer("m2", 65, 130, 32, rank=3)
    assert layer.row_scale is not None
    layer.row_scale.mul_(2.0**-8)  # float16 ends at 65504
    module = QuantizedLinear(layer, None, Scratch())
    monkeypatch.setenv(PATH_VARIABLE, way)
    wide = torch.randn(130, 7, 2).half()
    inputs = {
        "columns": wide[:, :, 0].t(),
        "strided rows": torch.randn(7, 300).half()[:, 3:133],
        "backwards": wide.permute(1, 2, 0),
        "one": torch.randn(130).half(),
        "the same": torch.randn(130).half().expand(5, 130),
        "none": torch.empty(0, 130).half(),
        "none of two": torch.empty(2, 0, 130).half(),
    }
    for name, x in inputs.items():
        y = module(x)
        assert y.dtype == torch.float16
        assert y.shape == (*x.shape[:-1], 65), name
        assert torch.equal(y, module(x.clone(memory_format=torch.contiguous_format))), name
        if y.numel():
            assert relative(y, truth(layer)(x)) < 4e-3, name


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("way", ["fused", "expanded"])
def test_not_a_number_stays_with_its_token(
    kernels: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "torch" and way == "fused":
        pytest.skip("there is no such path")
    module = QuantizedLinear(random_layer("m2", 21, 45, rank=2), torch.ones(21), Scratch())
    monkeypatch.setenv(PATH_VARIABLE, way)
    x = torch.randn(6, 45).bfloat16()
    spoiled = x.clone()
    spoiled[1, 3], spoiled[4, 4] = float("nan"), float("inf")
    y = module(spoiled)
    assert y[[1, 4]].isnan().all()
    assert torch.equal(y[[0, 2, 3, 5]], module(x)[[0, 2, 3, 5]])


@pytest.mark.parametrize("kind", ["m1", "m2"])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(1, 1, 1), (65, 301, 32), (130, 257, 257), (64, 128, 96)]
)
def test_one_copy_that_stays_canonical_outside(
    kernels: str, kind: Kind, rows: int, columns: int, group_size: int
) -> None:
    layer = random_layer(kind, rows, columns, group_size, rank=3, seed=rows)
    plain = {name.removeprefix("layer."): t.clone() for name, t in layer.tensors().items()}
    module = QuantizedLinear(layer, torch.ones(rows), Scratch())
    assert (module.arranged is None) == (kernels == "torch")
    if module.arranged is not None:
        assert module.weight_packed is None
        assert module.weight_scale is None
        assert type(module.arranged).__name__.lower() == kernels + "weights"
    have = module.state_dict()
    assert have.keys() == plain.keys() | {"bias"}
    for name, tensor in plain.items():
        assert have[name].dtype == tensor.dtype, name
        assert torch.equal(have[name].view(torch.uint8), tensor.view(torch.uint8)), name
    want = layer.dequantize() + layer.lorc_product()
    assert torch.equal(module.weight, want)
    for again in (module, copy.deepcopy(module)):
        again.half()
        again._restore()
        assert again.arranged is None
        restored = again.packed().tensors()
        assert restored.keys() == layer.tensors().keys()
        for name, tensor in layer.tensors().items():
            assert torch.equal(restored[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_the_weights_are_not_there_twice(kernels: str) -> None:
    layer = random_layer("m2", 512, 1024, 128, rank=8)
    module = QuantizedLinear(layer, None, Scratch())
    on_disk = sum(tensor.nbytes for tensor in layer.tensors().values())
    assert sum(tensor.nbytes for tensor in module.buffers()) < 1.25 * on_disk


def test_arranged_and_away(kernels: str) -> None:
    """Moving takes the weights out of their order, arriving puts them back."""
    layer = random_layer("m1", 65, 130, 32, rank=3)
    module = QuantizedLinear(layer, torch.ones(65), Scratch())
    x = torch.randn(5, 130).bfloat16()
    want, saved = module(x), module.state_dict()
    module.to("meta")
    assert module.arranged is None
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    module.to_empty(device="cpu")
    assert (module.arranged is None) == (kernels == "torch")
    module.load_state_dict(saved)
    assert torch.equal(module(x), want)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), saved[name].view(torch.uint8)), name


def test_a_copy_works_alone(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH_VARIABLE, "expanded")
    module = QuantizedLinear(random_layer("m2", 21, 45), None, Scratch())
    x = torch.randn(5, 45).bfloat16()
    want = module(x)
    copied = copy.deepcopy(module)
    assert copied._scratch is not module._scratch
    del module
    gc.collect()
    assert torch.equal(copied(x), want)


@pytest.mark.parametrize(
    ("kind", "group_size", "rank", "dtype", "tokens", "want"),
    [
        ("m2", 32, 0, torch.bfloat16, 1, "fused"),
        ("m1", 32, 8, torch.float16, 512, "fused"),
        ("m2", 32, 0, torch.bfloat16, 513, "by kernels"),
        ("m2", 16, 0, torch.bfloat16, 1, "expanded"),
        ("m2", 32, 41, torch.bfloat16, 1, "expanded"),
        ("m2", 32, 0, torch.float32, 1, "reference"),
        ("free", 32, 0, torch.bfloat16, 1, "reference"),
    ],
)
def test_the_way_is_chosen(
    kernels: str,
    kind: Kind,
    group_size: int,
    rank: int,
    dtype: torch.dtype,
    tokens: int,
    want: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[int] = []

    def prefers_expanded(
        tokens: int, rows: tuple[int], columns: int, rank: int, finishes: bool, device: int
    ) -> bool:
        called.append(tokens)
        assert finishes == (rank > 0 or dtype == torch.float16)
        return tokens == 513

    monkeypatch.setattr(schedules, "prefers_expanded", prefers_expanded)
    module = QuantizedLinear(random_layer(kind, 40, 72, group_size, rank), None, Scratch())
    x = torch.randn(tokens, 72).to(dtype)
    want = "expanded" if want == "by kernels" else want
    want = "expanded" if want == "fused" and kernels == "torch" else want
    assert module.path(x) == want
    assert set(called) <= {tokens}
    monkeypatch.setenv(PATH_VARIABLE, "reference")
    assert module.path(x) == "reference"
    monkeypatch.setenv(PATH_VARIABLE, "expanded")
    if want != "reference":
        assert module.path(x) == "expanded"
    else:
        with pytest.raises(OptionError) as raised:
            module(x)
        assert raised.value.where == "ZQFP_PATH=expanded"
        assert str(dtype) in raised.value.found


def test_expanded_with_one_scratch_for_all(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH_VARIABLE, "expanded")
    scratch = Scratch()
    layers = [random_layer("m2", *shape, rank=2) for shape in ((21, 45), (64, 160), (3, 7))]
    modules = [QuantizedLinear(layer, torch.randn(layer.rows), scratch) for layer in layers]
    place = scratch.matrix(16, 16, torch.device("cpu")).data_ptr()
    for layer, module in [*zip(layers, modules, strict=True)] * 2:
        x = torch.randn(5, layer.columns).bfloat16()
        assert module.path(x) == "expanded"
        assert relative(module(x), truth(layer, module.bias)(x)) < 4e-3
    assert scratch.matrix(64, 256, torch.device("cpu")).data_ptr() == place


@pytest.mark.parametrize("way", ["auto", "expanded", "reference"])
def test_gradients(kernels: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way != "auto":
        monkeypatch.setenv(PATH_VARIABLE, way)
    layer = random_layer(rank=3, span=4)
    module = QuantizedLinear(layer, torch.randn(40), Scratch(), torch.bfloat16)
    x = torch.randn(2, 3, 72).bfloat16().requires_grad_()
    y = module(x)
    with torch.no_grad():
        assert torch.equal(y, module(x))
    gradient = torch.randn(2, 3, 40).bfloat16()
    y.backward(gradient)
    assert x.grad.dtype == x.dtype
    dense = truth(layer)
    weight = dense.weight + dense.lorc[1] @ dense.lorc[0]
    assert relative(x.grad, gradient.double() @ weight) < 1e-2


@pytest.mark.parametrize("way", ["auto", "fused", "expanded", "reference"])
def test_compiled_whole(kernels: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "torch" and way == "fused":
        pytest.skip("there is no such path")
    monkeypatch.setattr(schedules, "prefers_expanded", lambda tokens, *shape: tokens > 8)
    if kernels == "portable":
        monkeypatch.setattr("zqfp_convert.runtime.kernels.portable.linear.FUSED_TOKENS", 8)
    if way != "auto":
        monkeypatch.setenv(PATH_VARIABLE, way)
    scratch = Scratch()
    model = nn.Sequential(
        QuantizedLinear(random_layer("m2", 40, 72, rank=3), torch.randn(40), scratch),
        QuantizedLinear(random_layer("m2", 72, 40), None, scratch),
    )
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for shape in ((5,), (2, 3), (3, 7)):
            x = torch.randn(*shape, 72).bfloat16()
            assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize(("path", "found"), [("expanded", "cpu"), ("fused9", "no such path")])
def test_a_path_that_cannot_be(path: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = QuantizedLinear(random_layer(), None, Scratch())
    monkeypatch.setenv(PATH_VARIABLE, path)
    with pytest.raises(OptionError) as raised:
        module(torch.randn(2, 72).bfloat16())
    assert raised.value.where == f"ZQFP_PATH={path}"
    assert found in raised.value.found


@pytest.mark.parametrize(("columns", "device"), [(256, "meta"), (512, "cpu")])
def test_an_input_that_does_not_fit_is_refused(columns: int, device: str) -> None:
    """Kernels are told addresses only, so what lies elsewhere must not reach them."""
    weights = HopperWeights(random_layer("m2", 64, 256), None).to(device)
    x = torch.ones(2, columns, dtype=torch.bfloat16)
    E2M1 = list(codebook.E2M1)
    buffers = ([weights.chunks], 1, E2M1, [weights.row_factor], [None], None, *[[]] * 4)
    with pytest.raises(OptionError, match=f"{columns} features on cpu"):
        hopper_linear._work(x, [64], *buffers, "fused", 0)


@pytest.mark.parametrize("together", [False, True])
def test_another_number_of_features_is_refused(kernels: str, together: bool) -> None:
    """Also where a whole number of rows could be made of them."""
    model = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        model.add_module(name, QuantizedLinear(random_layer("m2", 64, 136), None, Scratch()))
    if together:
        siblings.link(model)
        for _ in range(2):
            for module in model.children():
                module(torch.randn(2, 136).bfloat16())
    with pytest.raises(OptionError, match="130 features on cpu"):
        model.get_submodule("q_proj")(torch.randn(136, 130).bfloat16())
