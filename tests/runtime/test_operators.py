"""The operators of torch that stand for a whole linear: what they promise before they run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from packed_layers import random_layer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from zqfp_convert.numerics import codebook
from zqfp_convert.numerics.scales import Kind
from zqfp_convert.runtime import expanded
from zqfp_convert.runtime.linear import QuantizedLinear, Scratch

NAMES = {"hopper": "hopper_linear", "portable": "portable_linear", "torch": "expanded_linear"}


def arguments(module: QuantizedLinear, x: Tensor, way: str = "auto") -> tuple[object, ...]:
    """What the operator of a module is called with."""
    made: list[tuple[object, ...]] = []
    owner = module.arranged
    if owner is None:
        home, operator = expanded, expanded.operator
    else:
        home = __import__(type(owner).__module__, fromlist=["operator"])
        operator = home.operator

    def note(*given: object) -> Tensor:
        made.append(given)
        return operator(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, "operator", note)
        if way != "auto":
            patch.setenv("ZQFP_PATH", way)
        module(x)
    return made[0]


@pytest.mark.parametrize("way", ["auto", "expanded"])
@pytest.mark.parametrize("rank", [0, 3])
def test_they_keep_the_rules_of_operators(kernels: str, rank: int, way: str) -> None:
    layer = random_layer("m2", 21, 45, rank=rank)
    if layer.lorc_A is not None and layer.lorc_B is not None:  # the check cannot compare E4M3
        A, B = layer.lorc_A.bfloat16(), layer.lorc_B.bfloat16()
        layer = dataclasses.replace(layer, lorc_A=A, lorc_B=B, lorc_scale=None)
    module = QuantizedLinear(layer, torch.ones(21), Scratch())
    operator = getattr(torch.ops.zqfp, NAMES[kernels]).default
    x = torch.randn(5, 45).bfloat16()
    # What they write beside the result are the operators' own buffers, and no argument.
    torch.library.opcheck(
        operator,
        arguments(module, x, way),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    assert not operator._schema.is_mutable


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "strided rows", "columns"])
def test_what_they_say_of_their_result(
    kernels: str, tokens: int, dtype: torch.dtype, layout: str
) -> None:
    module = QuantizedLinear(random_layer("m2", 21, 45, rank=3), torch.ones(21), Scratch())
    operator = getattr(torch.ops.zqfp, NAMES[kernels]).default
    given = arguments(module, torch.randn(5, 45).to(dtype))
    x = {
        "contiguous": torch.randn(tokens, 45),
        "strided rows": torch.randn(tokens, 60)[:, 5:50],
        "columns": torch.randn(45, tokens).t(),
    }[layout].to(dtype)
    real = operator(x, *given[1:])
    mode = FakeTensorMode()
    fakes = tree_map(lambda a: mode.from_tensor(a) if isinstance(a, Tensor) else a, given)
    with mode:
        fake = operator(mode.from_tensor(x), *fakes[1:])
    fake, real = ([*y] if isinstance(y, list) else [y] for y in (fake, real))
    (fake,), (real,) = fake, real
    assert fake.shape == real.shape == (tokens, 21)
    assert fake.dtype == real.dtype == dtype
    assert fake.device == real.device
    assert fake.stride() == real.stride()


def test_on_a_gpu_that_is_not_there(kernels: str) -> None:
    """A fake result needs no kernel, no compiler and no device."""
    module = QuantizedLinear(random_layer("m2", 21, 45, rank=3), torch.ones(21), Scratch())
    given = arguments(module, torch.randn(5, 45).bfloat16())
    operator = getattr(torch.ops.zqfp, NAMES[kernels]).default
    with FakeTensorMode():
        there = tree_map(
            lambda a: (
                torch.empty(a.shape, dtype=a.dtype, device="cuda") if isinstance(a, Tensor) else a
            ),
            given,
        )
        y = operator(*there)
        if isinstance(y, list):
            (y,) = y
    assert y.shape == (5, 21)
    assert y.device.type == "cuda"


def test_one_node_of_the_graph(kernels: str) -> None:
    """Nothing of what an operator decides or writes is traced; the scratch buffer is no input."""
    scratch = Scratch()
    model = nn.Sequential(
        QuantizedLinear(random_layer("m2", 40, 72), None, scratch),
        QuantizedLinear(random_layer("m2", 72, 40), None, scratch),
    )
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        compiled(torch.randn(5, 72).bfloat16())
        compiled(torch.randn(3, 72).bfloat16())
    (graph,) = seen  # and the other number of tokens takes the same
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    ours = [node for node in calls if "zqfp" in str(node.target)]
    assert len(ours) == 2
    assert all("copy" not in str(node.target) for node in calls)


@pytest.mark.parametrize("kind", ["m1", "m2", "free"])
def test_the_reference_path_is_one_for_inference(kind: Kind) -> None:
    """So a compiler gives it the bytes that it has without; with gradients it is traced."""
    books = (codebook.E2M1,) if kind == "free" else codebook.PAIR
    layer = random_layer(kind, 21, 45, rank=3, books=books)
    layer = dataclasses.replace(layer, input_offset=torch.randn(45).bfloat16())
    module = QuantizedLinear(layer, torch.randn(21), Scratch())
    x = torch.randn(2, 5, 45)
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
    x.requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None
    ours = [[n for n in g.graph.nodes if "reference_linear" in str(n.target)] for g in seen]
    assert [len(nodes) for nodes in ours] == [1, 0]
