"""Every path on a real GPU with FP8: against float64, compiled, in CUDA graphs, moved about.

Each test runs for each kind of kernels that the GPU can have; the ones it would choose by itself
are told to be unavailable where others are meant.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from threading import Thread

import pytest
import torch
from dequantized import lorc_of, seen, weight_of
from packed_layers import random_layer
from torch import Tensor, nn

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.numerics import codebook
from zqfp_convert.numerics.scales import Kind
from zqfp_convert.runtime import expanded, paths, siblings
from zqfp_convert.runtime.kernels.hopper import fused, multiply, quantize, schedules
from zqfp_convert.runtime.kernels.hopper.layout import Chunks
from zqfp_convert.runtime.kernels.hopper.linear import HopperWeights, multiply_all, together
from zqfp_convert.runtime.linear import PATH_VARIABLE, QuantizedLinear, Scratch

CUDA = torch.device("cuda", 0)

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and expanded.available(CUDA)), reason="needs a GPU with FP8"
)

# Relative Frobenius errors. Rounding to bfloat16 alone is 1.7e-3; tensor cores keep about 14 bits
# of a sum. The expanded path rounds to bfloat16 a second time where anything is added.
ONCE, TWICE = 2.2e-3, 3.2e-3

WAYS = [
    ("hopper", "fused"),
    ("hopper", "expanded"),
    ("portable", "fused"),
    ("portable", "expanded"),
    ("torch", "expanded"),
]


@pytest.fixture(params=WAYS, ids="-".join)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The kernels and the path that modules made from here on have to take."""
    kernels, path = request.param
    for name in ("hopper", "portable"):
        if name != kernels:
            monkeypatch.setattr(getattr(paths, name), "available", lambda: False)
    if paths.kernels_for(CUDA, "m2", 128, 4096, 8) != kernels:
        pytest.skip(f"no {kernels} kernels on this GPU")
    monkeypatch.setenv(PATH_VARIABLE, path)
    return kernels, path


def moderate(layer: PackedLayer) -> PackedLayer:
    """Results stay within float16."""
    if layer.row_scale is not None:
        layer.row_scale.mul_(2.0**-9)
    else:
        layer.scale.sub_(13)
    return layer


def module_of(layer: PackedLayer, bias: Tensor | None = None) -> QuantizedLinear:
    # A copy: `random_layer` gives its tensors to the module, which moves them.
    return QuantizedLinear(copy.deepcopy(layer), bias, Scratch()).to(CUDA)


def truth(layer: PackedLayer, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer in float64 on the same FP8 activations, sharing no code with the package."""
    size = layer.columns, layer.group_size
    weight = weight_of(layer.tensors(), layer.name, *size, layer.books).to(CUDA)
    offset = layer.input_offset
    # On the CPU: on GPUs torch divides by a number inexactly.
    codes = seen(x.cpu().float() if offset is None else x.cpu().float() - offset.float())
    inputs = codes.double().to(CUDA)
    y = inputs @ weight.t()
    lorc = lorc_of(layer.tensors(), layer.name)
    if lorc is not None:
        y = y + inputs @ lorc[0].to(CUDA).t() @ lorc[1].to(CUDA).t()
    return y if bias is None else y + bias.to(CUDA).double()


def relative(have: Tensor, want: Tensor) -> float:
    return float((have.double() - want).norm() / want.norm())


def assert_right(
    layer: PackedLayer, x: Tensor, way: tuple[str, str], bias: Tensor | None = None
) -> None:
    module = module_of(layer, bias)
    assert module._kernels == way[0]
    assert module.path(x) == way[1]
    y = module(x)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], layer.rows)
    assert y.is_contiguous()
    assert y.numel() >= 5000  # enough for the mean error
    added = layer.lorc_A is not None or bias is not None
    limit = TWICE if way[1] == "expanded" and added else ONCE
    assert relative(y, truth(layer, x, bias)) < limit


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=CUDA).to(dtype)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(64, 128), (1, 1), (77, 131), (1000, 1031), (4096, 4096), (4160, 1536)],
)
def test_shapes(rows: int, columns: int, way: tuple[str, str]) -> None:
    layer = moderate(random_layer("m2", rows, columns, 128, rank=8, seed=rows))
    module = module_of(layer)
    x = inputs(1030, columns)
    want = truth(layer, x)
    limit = TWICE if way[1] == "expanded" else ONCE
    for tokens in (1, 3, 8, 9, 16, 17, 33, 64, 65, 129, 300, 513, 1030):
        y = module(x[:tokens])
        assert y.shape == (tokens, rows)
        # Too few elements do not have the mean error.
        assert relative(y, want[:tokens]) < (limit if y.numel() >= 5000 else 2.0**-7), tokens


@pytest.mark.parametrize("kind", ["m1", "m2"])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256, 0])
@pytest.mark.parametrize("tokens", [25, 70, 600])
def test_groups(kind: Kind, group_size: int, tokens: int, way: tuple[str, str]) -> None:
    columns = 1100
    layer = moderate(random_layer(kind, 200, columns, group_size or columns, seed=group_size))
    assert_right(layer, inputs(tokens, columns), way)


@pytest.mark.parametrize("rank", [1, 8, 20, 32])
@pytest.mark.parametrize("factors", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("tokens", [6, 33, 600])
def test_low_rank(rank: int, factors: torch.dtype, tokens: int, way: tuple[str, str]) -> None:
    layer = moderate(random_layer("m2", 1000, 515, 64, rank))
    assert layer.lorc_A is not None
    assert layer.lorc_B is not None
    assert layer.lorc_scale is not None
    # As large as the rest, so that an error in it shows.
    size = layer.dequantize().norm() / layer.lorc_product().norm()
    layer.lorc_scale.mul_(float(size))
    if factors == torch.bfloat16:
        A = (layer.lorc_A.float() * layer.lorc_scale[:, None]).bfloat16()
        layer = dataclasses.replace(
            layer, lorc_A=A, lorc_B=layer.lorc_B.bfloat16(), lorc_scale=None
        )
    assert_right(layer, inputs(tokens, 515), way)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("tokens", [26, 130, 600])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_and_offset(
    dtype: torch.dtype, rank: int, tokens: int, bias_dtype: torch.dtype, way: tuple[str, str]
) -> None:
    layer = moderate(random_layer("m2", 200, 300, 128, rank))
    layer = dataclasses.replace(layer, input_offset=torch.randn(300).bfloat16())
    bias = torch.randn(200).to(bias_dtype)
    assert_right(layer, inputs(tokens, 300, dtype=dtype), way, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (3, 1, 5), (0,), (2, 0)])
def test_leading_dimensions(
    shape: tuple[int, ...], dtype: torch.dtype, way: tuple[str, str]
) -> None:
    layer = moderate(random_layer("m2", 130, 300, 128, 8))
    module = module_of(layer)
    x = inputs(*shape, 300, dtype=dtype)
    y = module(x)
    assert y.shape == (*shape, 130)
    assert y.dtype == dtype
    if y.numel():
        assert torch.equal(y.reshape(-1, 130), module(x.reshape(-1, 300)))
        assert relative(y, truth(layer, x)) < TWICE


def test_inputs_of_any_layout(way: tuple[str, str]) -> None:
    module = module_of(moderate(random_layer("m2", 130, 300, 128, 8)))
    wide = inputs(300, 7, 2)
    for x in (
        inputs(7, 1000)[:, 3:303],
        inputs(7, 1001)[:, :300],
        inputs(300, 7).t(),
        inputs(300).expand(5, 300),
        wide.permute(1, 2, 0),
        inputs(2, 7, 1200)[:, ::2, ::4],
    ):
        assert torch.equal(module(x), module(x.contiguous()))


@pytest.mark.parametrize("tokens", [18, 600])
def test_one_huge_group(tokens: int, way: tuple[str, str]) -> None:
    layer = moderate(random_layer("m2", 300, 2048, 128))
    layer.scale.fill_(127 - 11)
    layer.scale[:, 5] = 127
    assert_right(layer, inputs(tokens, 2048), way)


@pytest.mark.parametrize("tokens", [8, 600])
def test_token_scales_over_six_decades(tokens: int, way: tuple[str, str]) -> None:
    layer = moderate(random_layer("m2", 500, 1024, 128, 8))
    sizes = torch.logspace(-3, 3, tokens, device=CUDA)
    x = (torch.randn(tokens, 1024, device=CUDA) * sizes[:, None]).bfloat16()
    have, want = module_of(layer)(x).double(), truth(layer, x)
    assert float(((have - want).norm(dim=1) / want.norm(dim=1)).max()) < 2 * TWICE


@pytest.mark.parametrize("tokens", [8, 600])
def test_zeros(tokens: int, way: tuple[str, str]) -> None:
    layer = moderate(random_layer("m2", 130, 300, 128))
    assert layer.row_scale is not None
    layer.packed[7] = 0
    layer.scale[7] = 127
    layer.row_scale[7] = 1
    bias = torch.randn(130).bfloat16()
    x = inputs(tokens, 300)
    x[3] = 0
    y = module_of(layer, bias)(x)
    assert torch.equal(y[3], bias.to(CUDA))
    assert torch.equal(y[:, 7], bias[7].to(CUDA).expand(tokens))
    assert relative(y, truth(layer, x, bias)) < TWICE


@pytest.mark.parametrize("tokens", [8, 20, 600])
@pytest.mark.parametrize("rank", [0, 8])
def test_not_a_number_stays_with_its_token(tokens: int, rank: int, way: tuple[str, str]) -> None:
    layer = moderate(random_layer("m2", 130, 300, 128, rank))
    module = module_of(layer, torch.randn(130))
    x = inputs(tokens, 300)
    spoiled = x.clone()
    spoiled[1, 3], spoiled[5, 299], spoiled[6, 0] = float("nan"), float("inf"), -float("inf")
    y = module(spoiled)
    assert y[[1, 5, 6]].isnan().all()
    others = [m for m in range(tokens) if m not in (1, 5, 6)]
    assert torch.equal(y[others], module(x)[others])


def test_the_same_bits_at_every_call(way: tuple[str, str]) -> None:
    module = module_of(moderate(random_layer("m2", 1000, 4096, 128, 8)))
    for tokens in (1, 16, 100, 600):
        x = inputs(tokens, 4096)
        first = module(x)
        assert all(torch.equal(module(x), first) for _ in range(5))


def test_layers_one_after_another(way: tuple[str, str]) -> None:
    """Kernels start before the one ahead has ended, and layers share a buffer."""
    scratch = Scratch()
    layers = [moderate(random_layer("m2", 512, 512, 128, 8, seed=seed)) for seed in range(6)]
    modules = [QuantizedLinear(layer, None, scratch).to(CUDA) for layer in layers]
    for tokens in (1, 40, 600):
        x = inputs(tokens, 512)
        slow, fast = [], []
        for module in modules:
            slow.append(module(x if not slow else slow[-1] / slow[-1].abs().amax()))
            torch.cuda.synchronize()
        for module in modules:
            fast.append(module(x if not fast else fast[-1] / fast[-1].abs().amax()))
        assert all(torch.equal(a, b) for a, b in zip(slow, fast, strict=True))


def test_in_a_new_thread(way: tuple[str, str]) -> None:
    """Where nothing else has touched the GPU yet; both new kernels and ones from before."""
    module = module_of(moderate(random_layer("m2", 136, 296, 128, 8)))
    few, many = inputs(5, 296), inputs(200, 296)
    want = module(few)
    torch.cuda.synchronize()
    have: list[Tensor] = []
    for x in (few, many):
        thread = Thread(target=lambda x=x: have.append(module(x)))
        thread.start()
        thread.join()
    assert torch.equal(have[0], want)
    assert torch.equal(have[1], module(many))


@pytest.mark.parametrize("tokens", [1, 3, 8, 15, 33, 64, 200, 300, 1000])
@pytest.mark.parametrize("rank", [0, 6])
def test_every_schedule(rank: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that get the same input, by every schedule that a GPU can be tuned to."""
    if paths.kernels_for(CUDA, "m2", 128, 4096, 8) != "hopper":
        pytest.skip("no Hopper")
    sizes, columns = (520, 77, 192), 1536
    layers = [moderate(random_layer("m2", rows, columns, 128, rank, seed=rows)) for rows in sizes]
    for layer in layers:
        if layer.lorc_scale is not None:  # as large as the rest, so that an error in it shows
            layer.lorc_scale.mul_(float(layer.dequantize().norm() / layer.lorc_product().norm()))
    bias = [torch.randn(rows) for rows in sizes]
    weights = [
        HopperWeights(copy.deepcopy(layer), one).to(CUDA)
        for layer, one in zip(layers, bias, strict=True)
    ]
    x, scratch = inputs(tokens, columns), Scratch()
    want = [truth(layer, x, one) for layer, one in zip(layers, bias, strict=True)]
    candidates = schedules.candidates(tokens, sum(sizes), columns)
    monkeypatch.setattr(schedules, "decodes", lambda *about: False)
    for schedule in candidates:
        monkeypatch.setattr(schedules, "choose", lambda *about, schedule=schedule: schedule)
        have = multiply_all(weights, x, "fused", scratch.key)
        for y, right in zip(have, want, strict=True):
            assert relative(y, right) < (ONCE if y.numel() >= 5000 else 2.0**-7), schedule
        again = multiply_all(weights, x, "fused", scratch.key)
        assert all(torch.equal(a, b) for a, b in zip(have, again, strict=True)), schedule


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", ["all", "some", "none"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    ("sizes", "columns", "group_size", "rank"),
    [
        ((520, 77, 192), 1536, 128, 6),
        ((64,), 100, 128, 0),
        ((1, 15, 17, 33), 1600, 64, 0),
        ((4096, 1024, 1024), 4096, 32, 8),
        ((9000, 9000), 640, 128, 16),
        ((4096,), 13440, 0, 32),
    ],
)
def test_decoding(
    sizes: tuple[int, ...],
    columns: int,
    group_size: int,
    rank: int,
    tokens: int,
    biased: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The product for few tokens; what nobody has written must not matter."""
    if paths.kernels_for(CUDA, "m2", 128, 4096, 8) != "hopper":
        pytest.skip("no Hopper")
    monkeypatch.setattr(schedules, "decodes", lambda *about: True)
    layers = [
        moderate(random_layer("m2", rows, columns, group_size or columns, rank, seed=rows))
        for rows in sizes
    ]
    for layer in layers:
        if layer.lorc_scale is not None:
            layer.lorc_scale.mul_(float(layer.dequantize().norm() / layer.lorc_product().norm()))
    has = {"all": 1, "some": 2, "none": len(sizes) + 1}[biased]
    bias = [None if (i + 1) % has else torch.randn(rows) for i, rows in enumerate(sizes)]
    weights = [
        HopperWeights(copy.deepcopy(layer), one).to(CUDA)
        for layer, one in zip(layers, bias, strict=True)
    ]
    x = inputs(tokens, columns, dtype=dtype)
    empty = torch.empty

    def poisoned(*about: object, **more: object) -> Tensor:
        made = empty(*about, **more)
        return made.view(torch.uint8).fill_(0x7F).view(made.dtype) if made.is_cuda else made

    monkeypatch.setattr(fused.torch, "empty", poisoned)
    ys = [torch.empty(tokens, rows, device=CUDA, dtype=x.dtype) for rows in sizes]
    matrices = [
        multiply.Matrix(Chunks(w.chunks, w.groups), w.row_factor, w.bias, y, w.outer)
        for w, y in zip(weights, ys, strict=True)
    ]
    assert fused.room(x, matrices).schedule is None
    have = multiply_all(weights, x, "fused", Scratch().key)
    for y, layer, one in zip(have, layers, bias, strict=True):
        assert relative(y, truth(layer, x, one)) < (ONCE if y.numel() >= 5000 else 2.0**-7)
    for _ in range(3):
        again = multiply_all(weights, x, "fused", Scratch().key)
        assert all(torch.equal(a, b) for a, b in zip(have, again, strict=True))


@pytest.mark.parametrize("books", [codebook.PAIR[1:], codebook.PAIR], ids=["one", "pair"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 0])
@pytest.mark.parametrize("tokens", [1, 5, 40, 600])
def test_other_codebooks(
    tokens: int, group_size: int, books: tuple[codebook.Codebook, ...], way: tuple[str, str]
) -> None:
    layer = moderate(random_layer("m2", 520, 1100, group_size or 1100, 8, books=books))
    x = inputs(tokens, 1100)
    module = module_of(layer)
    assert module._kernels == way[0]
    limit = TWICE if tokens >= 10 else 2.0**-7
    assert relative(module(x), truth(layer, x)) < limit
    module.load_state_dict(module.state_dict())
    assert relative(module(x), truth(layer, x)) < limit


@pytest.mark.parametrize("decodes", [True, False])
def test_siblings_with_other_codebooks(decodes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens, by both products; and codebooks that differ are multiplied apart."""
    if paths.kernels_for(CUDA, "m2", 128, 4096, 8) != "hopper":
        pytest.skip("no Hopper")
    monkeypatch.setattr(schedules, "decodes", lambda *about: decodes)
    layers = [
        moderate(random_layer("m2", rows, 700, 128, 8, books=codebook.PAIR)) for rows in (520, 77)
    ]
    weights = [HopperWeights(copy.deepcopy(layer), None).to(CUDA) for layer in layers]
    x = inputs(3, 700)
    for y, layer in zip(multiply_all(weights, x, "fused", Scratch().key), layers, strict=True):
        assert relative(y, truth(layer, x)) < 2.0**-7
    plain = HopperWeights(random_layer("m2", 64, 700, 128, 8), None).to(CUDA)
    assert together(weights)
    assert not together([*weights, plain])


@torch.no_grad()
def test_siblings(way: tuple[str, str]) -> None:
    """Compiled, captured and as they are, together as well as alone."""
    scratch, names = Scratch(), ("q_proj", "k_proj", "v_proj")
    layers = [moderate(random_layer("m2", rows, 260, 128, 8)) for rows in (512, 72, 64)]
    model = nn.Module()
    for name, layer in zip(names, layers, strict=True):
        model.add_module(name, QuantizedLinear(copy.deepcopy(layer), None, scratch))
    model.to(CUDA)
    siblings.link(model)
    model.forward = lambda x: [model.get_submodule(name)(x) for name in names]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for tokens in (1, 40, 600):
        x = inputs(tokens, 260)
        want = [truth(layer, x) for layer in layers]
        model.get_submodule("q_proj")(x)
        assert (model.get_submodule("q_proj")._siblings.pending is not None) == (way[0] == "hopper")
        model.get_submodule("q_proj")._siblings.forget()
        for run in (model, compiled, compiled, compiled):
            for y, right in zip(run(x), want, strict=True):
                assert relative(y, right) < (TWICE if y.numel() >= 5000 else 2.0**-7)


def two_layers() -> nn.Sequential:
    scratch = Scratch()
    layers = (random_layer("m2", 520, 260, 128, 8), random_layer("m2", 260, 520, 128))
    linears = [
        QuantizedLinear(moderate(layer), torch.randn(layer.rows), scratch) for layer in layers
    ]
    return nn.Sequential(linears[0], nn.Tanh(), linears[1]).to(CUDA)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"dynamic": True}, {"mode": "reduce-overhead"}], ids=str)
def test_compiled(settings: dict[str, object], way: tuple[str, str]) -> None:
    model = two_layers()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, **settings)
    for tokens in (8, 17, 600):
        for _ in range(3):
            x = inputs(tokens, 260)
            torch.testing.assert_close(compiled(x).clone(), model(x), rtol=2**-5, atol=0.1)


@torch.no_grad()
def test_compiled_with_the_path_left_open(
    way: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PATH_VARIABLE)
    model = two_layers()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for tokens in (5, 17, 513, 2000):
        x = inputs(tokens, 260)
        torch.testing.assert_close(compiled(x), model(x), rtol=2**-5, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 16, 100, 600])
def test_cuda_graph(tokens: int, way: tuple[str, str]) -> None:
    model = two_layers()
    x = inputs(tokens, 260)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    for _ in range(5):
        again = inputs(tokens, 260)
        x.copy_(again)
        graph.replay()
        assert torch.equal(y, model(again))


@torch.no_grad()
def test_first_use_while_a_graph_is_captured(way: tuple[str, str]) -> None:
    """Of a kernel that is on disk, but not yet on the GPU."""
    if way != ("hopper", "fused"):
        pytest.skip("torch's own products and Triton's kernels want to be warm")
    layer = moderate(random_layer("m2", 136, 264, 32, 24))
    module = module_of(layer)
    x = inputs(41, 264, dtype=torch.float16)
    module(x)
    quantize._kernel.cache_clear()
    multiply._kernel.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    graph.replay()
    assert relative(y, truth(layer, x)) < (TWICE if y.numel() >= 5000 else 2.0**-7)


@pytest.mark.parametrize("kind", ["m1", "m2"])
@pytest.mark.parametrize(("rows", "columns", "size"), [(130, 301, 32), (64, 256, 128), (5, 7, 7)])
def test_there_and_back(
    kind: Kind, rows: int, columns: int, size: int, way: tuple[str, str]
) -> None:
    layer = random_layer(kind, rows, columns, size, rank=3)
    on_disk = {name.removeprefix("layer."): t.clone() for name, t in layer.tensors().items()}
    module = QuantizedLinear(layer, None, Scratch())

    def assert_whole() -> None:
        have = module.state_dict()
        assert have.keys() == on_disk.keys()
        for name, tensor in on_disk.items():
            assert have[name].dtype == tensor.dtype
            assert torch.equal(have[name].cpu().view(torch.uint8), tensor.view(torch.uint8)), name

    x = inputs(3, columns)
    moves: list[Callable[[], object]] = [module.cuda, module.cpu, lambda: module.to("cuda:0")]
    results = []
    for move in moves:
        move()
        assert_whole()
        if module._device.type == "cuda":
            assert (module.weight_packed is None) == (way[0] != "torch")
            results.append(module(x))
        else:
            assert module.arranged is None
    assert torch.equal(*results)
    module.half()
    assert torch.equal(module(x), results[0])


def test_memory_does_not_double(way: tuple[str, str]) -> None:
    layer = random_layer("m2", 4096, 4096, 128, rank=8)
    on_disk = sum(tensor.nbytes for tensor in layer.tensors().values())
    scratch = Scratch()
    scratch.matrix(4096, 4096, CUDA)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    module = QuantizedLinear(layer, None, scratch).to(CUDA)
    assert torch.cuda.memory_allocated() - before < 1.1 * on_disk
    assert module._device.type == "cuda"


def test_gradients(way: tuple[str, str]) -> None:
    layer = moderate(random_layer("m2", 130, 300, 128, 8))
    module = module_of(layer)
    x = inputs(4, 300).requires_grad_()
    y = module(x)
    with torch.inference_mode():
        assert torch.equal(module(x), y)
    y.backward(torch.ones_like(y))
    want = layer.approximation().to(CUDA).sum(0).expand(4, -1)
    assert relative(x.grad, want) < 2e-2


def test_groups_that_no_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    layer = moderate(random_layer("m2", 130, 300, 16, 8))
    x = inputs(20, 300)
    module = module_of(layer)
    assert module.path(x) == "expanded"
    assert relative(module(x), truth(layer, x)) < TWICE
    free = module_of(random_layer("free", 130, 300, 128))
    assert free.path(x) == "reference"
    assert free(x).isfinite().all()
