"""Puts experts with linears of their own in the place of fused ones, once they are proved equal.

How the fused parameters lie is not looked up by the model's name: their shapes and the module's own
activation say it, and what was made of them has to give, in float64, what the module gives.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from zqfp_convert.model.experts import (
    DOWN,
    GATE,
    UP,
    Activate,
    Expert,
    ExpertLinear,
    Experts,
    Fused,
    IndexedExperts,
    SortedExperts,
)

GATE_UP = "gate_up_proj"
BIAS = "_bias"
TOLERANCE = 1e-6  # relative, of float64 outputs; some models add up in float32 all the same
SMALLEST = 8  # features of the small copy that the proof is done on
CHOSEN = 2  # experts of each token, in the proof
TOKENS = 32
LOUD = 30.0  # a second proof with inputs so large that activations are clamped where they can be


def unfuse(model: nn.Module) -> dict[str, nn.Module]:
    """Replace the fused experts in a model on the meta device; those that are not known stay.

    Returns:
        The modules that were replaced, by their names.
    """
    replaced: dict[str, nn.Module] = {}
    proved: dict[object, bool] = {}  # by kinds of modules
    for name, module in list(model.named_modules()):
        if not _is_fused(module):
            continue
        kind = (type(module), *sorted(_shapes(module).items()))
        if kind not in proved:
            proved[kind] = _proved(module)
        if proved[kind]:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, _experts(module))
            replaced[name] = module
    return replaced


def fuse(experts: Experts, module: nn.Module) -> nn.Module:
    """The module that experts were made of, with their weights, which they lose."""
    held = {fused.leaf for fused in experts.fused.values()}
    linears = [part for part in experts.modules() if isinstance(part, nn.Linear)]
    assert "bias" in held or all(linear.bias is None for linear in linears)
    for name, fused in experts.fused.items():
        joined = []
        for expert in experts:
            own = [expert.get_submodule(part) for part in fused.parts]
            joined.append(fused.join([one.get_parameter(fused.leaf).data for one in own]))
            for linear in own:
                del linear._parameters[fused.leaf]
        setattr(module, name, nn.Parameter(torch.stack(joined)))
    return module.train(experts.training)


def _is_fused(module: nn.Module) -> bool:
    """Whether a module has experts in parameters of its own, and nothing else."""
    shapes = _shapes(module)
    inner = GATE_UP if GATE_UP in shapes else UP
    names = {inner, DOWN}
    known = shapes.keys() in (names, names | {inner + BIAS, DOWN + BIAS})
    own = len(list(module.parameters())) == len(shapes)
    return known and own and all(len(shapes[name]) == 3 for name in names)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in module._parameters.items() if p is not None}


def _fused(module: nn.Module) -> dict[str, Fused] | None:
    """How each parameter lies; None if the shapes do not belong together."""
    shapes = _shapes(module)
    inner = GATE_UP if GATE_UP in shapes else UP
    parts = (GATE, UP) if inner == GATE_UP else (UP,)
    (count, *first), (same, *second) = shapes[inner], shapes[DOWN]
    transposed = bool(getattr(module, "is_transposed", False))
    if inner == GATE_UP:
        transposed = first == [second[1], 2 * second[0]]
    width, middle = (second[1], second[0]) if transposed else (second[0], second[1])
    rows = len(parts) * middle
    if count != same or first != ([width, rows] if transposed else [rows, width]):
        return None
    interleaved = inner == GATE_UP and _interleaves(module)
    found = {}
    for name, shape in shapes.items():
        leaf = "bias" if name.endswith(BIAS) else "weight"
        own = parts if name.startswith(inner) else (DOWN,)
        if leaf == "bias" and shape != (count, rows if own == parts else width):
            return None
        found[name] = Fused(own, leaf, shape, transposed, interleaved and len(own) > 1)
    return found


def _experts(module: nn.Module) -> Experts:
    """The same experts on the meta device."""
    fused = _fused(module)
    assert fused is not None
    dtype = module.get_parameter(DOWN).dtype
    activate = _activation(module)
    biased = DOWN + BIAS in fused

    def linears() -> Iterator[tuple[str, nn.Linear]]:
        for one in fused.values():
            if one.leaf == "weight":
                columns, rows = one.shape[1:] if one.transposed else one.shape[:0:-1]
                for part in one.parts:
                    out = rows // len(one.parts)
                    yield part, ExpertLinear(columns, out, biased, device="meta", dtype=dtype)

    each = [Expert(dict(linears()), activate) for _ in range(fused[DOWN].shape[0])]
    arguments = inspect.signature(type(module).forward).parameters
    kind = SortedExperts if len(arguments) == 2 else IndexedExperts
    return kind(each, fused)


def _activation(module: nn.Module) -> Activate:
    """What a module does between its matrices, without the module's weights."""
    bare = copy.copy(module)
    bare._parameters = {}
    if GATE_UP not in module._parameters:
        return lambda up: bare.act_fn(up)  # type: ignore[operator]
    if not hasattr(bare, "_apply_gate"):
        return lambda gate, up: bare.act_fn(gate) * up  # type: ignore[operator]
    if _interleaves(bare):
        return lambda gate, up: bare._apply_gate(  # type: ignore[operator]
            torch.stack((gate, up), -1).flatten(-2)
        )
    return lambda gate, up: bare._apply_gate(  # type: ignore[operator]
        torch.cat((gate, up), -1)
    )


def _interleaves(module: nn.Module) -> bool:
    """Whether gate and up rows take turns: the first output depends on the first two."""
    if not hasattr(module, "_apply_gate"):
        return False
    merged = torch.linspace(0.5, 1.0, 8, dtype=torch.float64)
    other = merged.clone()
    other[1] += 0.25
    gate = module._apply_gate
    return bool(gate(merged)[0] != gate(other)[0])  # type: ignore[operator]


@torch.no_grad()
def _proved(module: nn.Module) -> bool:
    """Whether the experts made of a module give what it gives, with random weights and tokens."""
    if _fused(module) is None:
        return False
    small = _small(module)
    ours = _experts(small).double()
    for name, fused in ours.fused.items():
        for number, expert in enumerate(ours):
            for part, local in enumerate(fused.parts):
                value = fused.part(small.get_parameter(name)[number], part)
                linear = expert.get_submodule(local)
                setattr(linear, fused.leaf, nn.Parameter(value, requires_grad=False))
    generator = torch.Generator().manual_seed(0)
    width = ours[0].get_submodule(DOWN).get_parameter("weight").shape[0]
    count = len(ours)
    routing: tuple[Tensor, ...] = ()
    tokens = TOKENS
    if isinstance(ours, SortedExperts):
        tokens = TOKENS * count
    else:
        scores = torch.rand(TOKENS, count, dtype=torch.float64, generator=generator)
        weights, index = scores.topk(min(CHOSEN, count))
        routing = index, weights
    hidden = torch.randn(tokens, width, dtype=torch.float64, generator=generator)
    if not routing:
        hidden *= torch.rand(tokens, 1, dtype=torch.float64, generator=generator).round()
    for loudness in (1.0, LOUD):
        try:
            want = small(hidden * loudness, *routing)
        except Exception:  # of the model's own lines, which may ask for anything
            return False
        have = ours(hidden * loudness, *routing)
        if want.shape != have.shape:
            return False
        if not bool((want - have).abs().max() <= TOLERANCE * want.abs().max()):
            return False
    return True


def _small(module: nn.Module) -> nn.Module:
    """A module of the same class with as many experts, fewer features and random weights.

    All features are divided by one number, which the shapes have in common; so are the attributes
    that say how many there are.
    """
    shapes = _shapes(module)
    features = {extent for shape in shapes.values() for extent in shape[1:]}
    common = math.gcd(*features)
    divisor = (
        max(d for d in range(1, common + 1) if common % d == 0 and common // d >= SMALLEST)
        if common >= SMALLEST
        else 1
    )
    small = copy.copy(module)
    small.__dict__ = dict(module.__dict__)
    generator = torch.Generator().manual_seed(1)
    small._parameters = {}
    for name, shape in shapes.items():
        fewer = (shape[0], *(extent // divisor for extent in shape[1:]))
        value = torch.randn(fewer, dtype=torch.float64, generator=generator)
        value /= math.sqrt(fewer[-1]) if len(fewer) == 3 else 1.0
        small._parameters[name] = nn.Parameter(value, requires_grad=False)
    for name, value in vars(module).items():
        if type(value) is int and value in features:
            setattr(small, name, value // divisor)
    config = copy.deepcopy(getattr(module, "config", None))
    if config is not None:
        config._experts_implementation = "eager"  # the model's own lines, in any dtype
        small.__dict__["config"] = config
    return small
