"""The whole method for a weight: on the grid, true to the format, better recipes really better."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from waits import Waits

from zqfp_convert.numerics import codebook, kernels, scales
from zqfp_convert.quantize import lorc
from zqfp_convert.quantize.gptq import gptq
from zqfp_convert.quantize.hessian import Curvature, HessianSum, aim_at_original, energy, prepare
from zqfp_convert.quantize.weight import QuantizedWeight, quantize_together, quantize_weight
from zqfp_convert.recipe import GROUP_SIZES, GroupSize, Recipe, ScaleKind

KINDS: tuple[ScaleKind, ...] = ("free", "m1", "m2")
RECIPES = ("fast", "paper", "best")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(tokens: int, features: int, seed: int) -> Tensor:
    """Correlated, with features of different sizes and some outliers among them."""
    mix = normal(features, features, seed=seed) * torch.logspace(0, -1, features)[:, None]
    sizes = torch.exp(0.7 * normal(features, seed=seed + 1))
    sizes[:: max(features // 3, 1)] *= 8
    return normal(tokens, features, seed=seed + 2) @ mix * sizes


def statistics(features: int, seed: int, *, drifted: bool) -> tuple[Tensor, Tensor | None]:
    original = inputs_of(4 * features, features, seed)
    seen = original + 0.2 * inputs_of(4 * features, features, seed + 10)
    total = HessianSum(features, cross=drifted, device="cpu")
    total.add(seen if drifted else original, original)
    return total.mean()


@lru_cache
def curvature_for(
    features: int, seed: int = 0, *, drifted: bool = False, activation_order: bool = True
) -> Curvature:
    hessian, cross = statistics(features, seed, drifted=drifted)
    return prepare(hessian, cross, damping=0.01, activation_order=activation_order)


def weight_of(rows: int, columns: int, seed: int = 0) -> Tensor:
    """With a zero row, a zero group and rows of different sizes."""
    weight = normal(rows, columns, seed=seed) * torch.exp(normal(rows, 1, seed=seed + 1)) * 0.02
    if rows > 4:
        weight[1] = 0.0
        weight[2, 32:64] = 0.0
        weight[3, :32] *= 1e-6
    return weight


def decoded(quantized: QuantizedWeight) -> np.ndarray:
    """Codes and scales as the format says, in float64."""
    codes, chosen = quantized.codes.numpy(), quantized.scales
    scale = np.ldexp(chosen.factor.double().numpy(), chosen.exponent.int().numpy())  # [N, G]
    group = np.arange(codes.shape[1]) // chosen.group_size
    values = np.array(chosen.books)
    choice = (
        np.zeros(scale.shape, int) if chosen.choice is None else chosen.choice.numpy().astype(int)
    )
    return np.where(codes >= 8, -1, 1) * values[choice[:, group], codes % 8] * scale[:, group]


def compensation(quantized: QuantizedWeight) -> np.ndarray:
    if quantized.factors is None:
        return np.zeros(quantized.codes.shape)
    A, B = quantized.factors.A.double().numpy(), quantized.factors.B.double().numpy()
    scale = quantized.factors.scale
    return B @ A if scale is None else (B * scale.double().numpy()) @ A


def check_rules(quantized: QuantizedWeight, shape: torch.Size) -> None:
    codes, chosen = quantized.codes, quantized.scales
    assert codes.shape == shape
    assert codes.dtype == torch.uint8
    assert codes.max() < 16
    assert not (codes == 8).any()
    assert torch.equal(chosen.factor, chosen.factor.bfloat16().float())
    assert (chosen.factor > 0).all()
    assert chosen.factor.isfinite().all()
    if chosen.kind == "free":
        return
    assert chosen.span is not None
    assert chosen.span <= 11
    largest = chosen.exponent.amax(1)
    if chosen.kind == "m2":
        assert (largest == 0).all()
    for g, part in enumerate(codes.split(chosen.group_size, 1)):
        empty = ~part.bool().any(1)
        assert torch.equal(chosen.exponent[empty, g], largest[empty])
    zero_row = ~codes.bool().any(1)
    assert (chosen.factor[zero_row] == 1).all()
    assert (chosen.exponent[zero_row] == 0).all()


def check_errors(quantized: QuantizedWeight, weight: Tensor, hessian: Tensor | None) -> None:
    E, W = (weight - quantized.dequantize()).double(), weight.double()
    assert quantized.weight_error == pytest.approx((E.norm() / W.norm()).item(), rel=1e-3)
    if hessian is None:
        assert quantized.output_error is quantized.output_energy is None
        return
    H = hessian.double()
    whole = ((W @ H) * W).sum()
    assert quantized.output_energy == pytest.approx(whole.item(), rel=1e-4)
    ratio = ((E @ H) * E).sum() / whole
    assert quantized.output_error == pytest.approx(ratio.sqrt().item(), rel=1e-3)


@pytest.mark.parametrize("columns", [24, 160, 300])  # below a group; short last groups
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(name: str, kind: ScaleKind, group_size: GroupSize, columns: int) -> None:
    rounding = "nearest" if kind == "free" and name == "paper" else None
    recipe = Recipe.named(name, scales=kind, scale_rounding=rounding, group_size=group_size)
    weight = weight_of(20, columns)
    curvature = curvature_for(columns, activation_order=recipe.activation_order)
    before = weight.clone()
    quantized = quantize_weight(weight, curvature, recipe)
    assert torch.equal(weight, before)
    assert quantized.scales.kind == kind
    assert quantized.scales.group_size == (columns if group_size == "row" else group_size)
    check_rules(quantized, weight.shape)
    check_errors(quantized, weight, curvature.hessian)
    wanted = torch.from_numpy(decoded(quantized) + compensation(quantized))
    assert torch.allclose(quantized.dequantize().double(), wanted, rtol=1e-5, atol=1e-7)
    if recipe.rank == 0:
        assert quantized.factors is None
        assert torch.equal(quantized.dequantize().double(), wanted)  # on the grid, bit by bit
    else:
        assert quantized.factors is not None
        assert quantized.factors.A.shape == (8, columns)
        assert quantized.factors.B.shape == (20, 8)
    again = quantize_weight(weight, curvature, recipe)
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.dequantize(), quantized.dequantize())
    assert (again.weight_error, again.output_error) == (
        quantized.weight_error,
        quantized.output_error,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RECIPES)
def test_without_curvature(name: str, kind: ScaleKind) -> None:
    rounding = "nearest" if kind == "free" and name == "paper" else None
    recipe = Recipe.named(name, scales=kind, scale_rounding=rounding)
    weight = weight_of(20, 300)
    quantized = quantize_weight(weight, None, recipe)
    check_rules(quantized, weight.shape)
    check_errors(quantized, weight, None)
    group_size = 256 if name == "paper" else 128
    books = codebook.PAIR if recipe.codebooks == "pair" else (codebook.E2M1,)
    chosen = scales.choose(weight, kind, recipe.scale_rounding, group_size, books=books)
    assert torch.equal(quantized.codes, scales.quantize(weight, chosen))
    if recipe.rank:  # plain decomposition: at least as good as none
        assert quantized.factors is not None
        grid = torch.from_numpy(decoded(quantized))
        assert (weight - quantized.dequantize()).norm() < 0.97 * (weight - grid).norm()


@pytest.mark.parametrize("seed", [0, 100, 200, 300])
@pytest.mark.parametrize("shape", [(96, 256), (256, 96)])
def test_better_recipes_are_better(seed: int, shape: tuple[int, int]) -> None:
    weight = normal(*shape, seed=seed)
    errors = []
    for name in ("best", "paper", "fast"):
        recipe = Recipe.named(name)
        curvature = curvature_for(shape[1], seed, activation_order=recipe.activation_order)
        error = quantize_weight(weight, curvature, recipe).output_error
        assert error is not None
        errors.append(error)
    best, paper, fast = errors
    assert best < 0.85 * paper
    assert paper < 0.85 * fast


def output_error(seed: int, recipe: Recipe) -> float:
    error = quantize_weight(
        normal(64, 128, seed=seed), curvature_for(128, seed), recipe
    ).output_error
    assert error is not None
    return error


@lru_cache
def error_of_best(seed: int) -> float:
    return output_error(seed, Recipe.named("best", group_size=32))


@pytest.mark.parametrize(
    "worse",
    [
        {"solver": "round", "sweeps": 0},
        {"sweeps": 0, "low_rank_rounds": 0},
        {"low_rank_rounds": 0},
        {"low_rank": "svd", "low_rank_rounds": 0},
        {"rank": 0},
        {"rank": 2},
        {"scale_rounding": "floor"},
        {"scale_rounding": "ceil"},
        {"scales": "m1"},
        {"group_size": "row"},
    ],
    ids=str,
)
def test_each_part_earns_its_place(worse: dict[str, Any]) -> None:
    """On average over some layers: `best` without the part is worse."""
    ratios = []
    for seed in range(0, 60, 10):
        recipe = Recipe.named("best", **{"group_size": 32, **worse})
        ratios.append(error_of_best(seed) / output_error(seed, recipe))
    assert sum(ratios) / len(ratios) < 0.99


def test_paper_is_gptq_and_a_decomposition_of_what_it_left() -> None:
    weight, curvature = normal(40, 300), curvature_for(300, activation_order=False)
    quantized = quantize_weight(weight, curvature, Recipe.named("paper"))
    chosen = scales.choose(weight, "m1", "ceil", 256)
    rounded = gptq(weight, curvature, chosen)
    assert torch.equal(quantized.codes, scales.quantize(rounded, chosen))
    assert torch.equal(quantized.scales.exponent, chosen.exponent)
    factors = lorc.encode(*lorc.fit(weight - rounded, None, 8), "e4m3")
    assert torch.equal(quantized.dequantize(), rounded + factors.product())


def test_the_factors_of_best_fit_what_its_last_sweep_left() -> None:
    weight, curvature = normal(40, 96), curvature_for(96)
    for rounds in (0, 1, 4):
        recipe = Recipe.named("best", low_rank_rounds=rounds, group_size=32)
        quantized = quantize_weight(weight, curvature, recipe)
        left = weight - scales.dequantize(quantized.codes, quantized.scales)
        factors = lorc.encode(*lorc.fit(left, curvature.hessian, 8), "e4m3")
        assert quantized.factors is not None
        missing = [left - found.product() for found in (quantized.factors, factors)]
        energies = [energy(one.double(), curvature.hessian.double()) for one in missing]
        assert energies[0] == pytest.approx(energies[1], rel=0.001)


@pytest.mark.parametrize("rank", [0, 8])
def test_asymmetry_aims_at_the_original(rank: int) -> None:
    weight = weight_of(20, 96)
    curvature = curvature_for(96, drifted=True)
    assert curvature.mismatch is not None
    plain = prepare(curvature.hessian, None, damping=0.01, activation_order=True)
    for asymmetry in (0.0, 0.5, 1.0):
        recipe = Recipe.named("best", asymmetry=asymmetry, group_size=32, rank=rank)
        target = aim_at_original(weight, curvature, asymmetry)
        aimed = quantize_weight(weight, curvature, recipe)
        assert torch.equal(aimed.codes, quantize_weight(target, plain, recipe).codes)
        assert torch.equal(aimed.dequantize(), quantize_weight(target, plain, recipe).dequantize())
        check_errors(aimed, weight, curvature.hessian)  # reported against the weight itself


def test_asymmetry_brings_outputs_nearer_to_the_original() -> None:
    original = inputs_of(400, 96, 0)
    seen = original + 0.2 * inputs_of(400, 96, 10)
    total = HessianSum(96, cross=True, device="cpu")
    total.add(seen, original)
    curvature = prepare(*total.mean(), damping=0.01, activation_order=True)
    weight = normal(40, 96)
    distances = [
        (
            original @ weight.t()
            - seen
            @ quantize_weight(weight, curvature, Recipe.named("best", asymmetry=asymmetry))
            .dequantize()
            .t()
        )
        .norm()
        .item()
        for asymmetry in (0.0, 0.5, 1.0)
    ]
    assert distances[2] < distances[1] < distances[0]


@pytest.mark.skipif(not kernels.available(), reason="no Triton")
def test_with_kernels_it_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the method, for what its parts hand to their kernels."""
    weight, (hessian, cross) = weight_of(20, 64), statistics(64, 0, drifted=True)
    recipe = Recipe.named("best", rank=4, group_size=32, low_rank_rounds=1)
    found = []
    for taken in (False, True):
        monkeypatch.setattr(kernels, "take", lambda tensor, taken=taken: taken)
        assert cross is not None
        moments = hessian.to(DEVICE), cross.to(DEVICE, copy=True)
        curvature = prepare(*moments, damping=0.01, activation_order=True)
        found.append(quantize_weight(weight.to(DEVICE), curvature, recipe))
    plain, fused = found
    same = plain.scales.exponent == fused.scales.exponent
    assert same.float().mean() > 0.99
    assert torch.equal(plain.scales.factor, fused.scales.factor)
    assert plain.output_error is not None
    assert fused.output_error == pytest.approx(plain.output_error, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    weight = (normal(20, 96) * 0.02).to(dtype)
    curvature = curvature_for(96)
    quantized = quantize_weight(weight, curvature, Recipe.named("best"))
    same = quantize_weight(weight.float(), curvature, Recipe.named("best"))
    assert torch.equal(quantized.codes, same.codes)
    assert quantized.dequantize().dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 5), (2, 129)])
@pytest.mark.parametrize("name", RECIPES)
def test_small_weights(shape: tuple[int, int], name: str) -> None:
    recipe = Recipe.named(name)
    weight = normal(*shape, seed=3)
    curvature = curvature_for(shape[1], activation_order=recipe.activation_order)
    for given in (curvature, None):
        quantized = quantize_weight(weight, given, recipe)
        check_rules(quantized, weight.shape)
        if recipe.rank:
            assert quantized.factors is not None
            rank = min(8, *shape)
            assert quantized.factors.A.shape == (rank, shape[1])
            assert quantized.factors.B.shape == (shape[0], rank)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_zeros(name: str, kind: ScaleKind) -> None:
    rounding = "nearest" if kind == "free" and name == "paper" else None
    recipe = Recipe.named(name, scales=kind, scale_rounding=rounding)
    curvature = curvature_for(96, activation_order=recipe.activation_order)
    quantized = quantize_weight(torch.zeros(20, 96), curvature, recipe)
    check_rules(quantized, torch.Size((20, 96)))
    assert not quantized.dequantize().any()
    assert (quantized.weight_error, quantized.output_error) == (0.0, 0.0)


@pytest.mark.parametrize("name", RECIPES)
def test_a_layer_that_saw_only_zeros(name: str) -> None:
    """An all-zero Hessian: rounded to nearest, and nothing is NaN."""
    recipe = Recipe.named(name)
    weight = weight_of(20, 96)
    curvature = prepare(torch.zeros(96, 96), None, damping=0.01, activation_order=True)
    quantized = quantize_weight(weight, curvature, recipe)
    check_rules(quantized, weight.shape)
    assert quantized.output_error == 0.0
    assert quantized.dequantize().isfinite().all()
    assert quantized.weight_error < 0.2


@pytest.mark.parametrize("columns", [0, 95])
def test_dead_inputs(columns: int) -> None:
    hessian = curvature_for(96).hessian.clone()
    hessian[columns] = 0
    hessian[:, columns] = 0
    curvature = prepare(hessian, None, damping=0.01, activation_order=True)
    weight = weight_of(20, 96)
    quantized = quantize_weight(weight, curvature, Recipe.named("best"))
    check_rules(quantized, weight.shape)
    check_errors(quantized, weight, hessian)


@pytest.mark.parametrize("factors", ["e4m3", "bf16"])
def test_forms_of_the_factors(factors: str) -> None:
    weight, curvature = weight_of(40, 96), curvature_for(96)
    quantized = quantize_weight(weight, curvature, Recipe.named("best", factors=factors))
    assert quantized.factors is not None
    dtypes = {"e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16}
    assert quantized.factors.A.dtype == quantized.factors.B.dtype == dtypes[factors]
    check_errors(quantized, weight, curvature.hessian)


def test_round_with_sweeps_uses_the_hessian() -> None:
    weight, curvature = normal(40, 96), curvature_for(96)
    errors = [
        quantize_weight(
            weight, curvature, Recipe.named("best", solver="round", rank=0, sweeps=sweeps)
        ).output_error
        for sweeps in (0, 1, 3)
    ]
    assert errors[2] < errors[1] < errors[0]  # type: ignore[operator]


def test_scales_are_searched_with_the_hessians_diagonal() -> None:
    weight, curvature = normal(40, 96), curvature_for(96)
    recipe = Recipe.named("fast", scale_rounding="search")
    quantized = quantize_weight(weight, curvature, recipe)
    chosen = scales.choose(weight, "m2", "search", 128, curvature.hessian.diagonal())
    assert torch.equal(quantized.scales.per_group(), chosen.per_group())
    unweighted = scales.choose(weight, "m2", "search", 128)
    assert not torch.equal(chosen.per_group(), unweighted.per_group())


def test_two_codebooks_are_closer_than_one() -> None:
    """Under the solvers too, and every element is on the grid of its group's codebook."""
    weight, curvature = normal(48, 256), curvature_for(256)
    errors = {}
    for books in ("e2m1", "pair"):
        recipe = Recipe.named("best", rank=0, asymmetry=0.0, codebooks=books)
        quantized = quantize_weight(weight, curvature, recipe)
        errors[books] = quantized.output_error
        assert (quantized.scales.choice is None) == (books == "e2m1")
    assert errors["pair"] < 0.95 * errors["e2m1"]
    chosen = quantized.scales
    assert chosen.choice is not None
    assert 0.05 < chosen.choice.float().mean() < 0.95
    again = scales.quantize(quantized.dequantize(), chosen)
    assert torch.equal(again, quantized.codes)


def test_layers_of_one_input_find_one_rank() -> None:
    """Outputs that feel four directions of the error: each layer is as with the rank given."""
    inputs = normal(1024, 192)
    inputs[:, ::48] *= 100
    total = HessianSum(192, cross=False, device="cpu")
    total.add(inputs)
    curvature = prepare(*total.mean(), damping=0.01, activation_order=False)
    weights = [normal(160, 192, seed=1) * 0.02, normal(64, 192, seed=2)]
    plain = Recipe.named("best", solver="round", sweeps=0)
    together = quantize_together(weights, curvature, plain.changed(rank="auto"))
    for weight, found in zip(weights, together, strict=True):
        given = quantize_weight(weight, curvature, plain.changed(rank=8))
        assert torch.equal(found.codes, given.codes)
        assert torch.equal(found.dequantize(), given.dequantize())
        assert found.output_error == given.output_error
    alone = quantize_weight(normal(160, 192), None, plain.changed(rank="auto"))
    assert alone.factors is None


@pytest.mark.skipif(not kernels.available(), reason="no Triton")
def test_a_gpu_is_waited_for_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all fits of factors, and once for the errors, however many weights there are."""
    monkeypatch.setattr(kernels, "take", lambda tensor: True)
    weights = [weight_of(rows, 64).to(DEVICE) for rows in (16, 16, 24)]
    hessian, _ = statistics(64, 0, drifted=False)
    curvature = prepare(hessian.to(DEVICE), None, damping=0.01, activation_order=True)
    recipe = Recipe.named("best", rank=4, group_size=32, low_rank_rounds=2)
    quantized = quantize_together(weights, curvature, recipe)  # now tables are made
    with Waits() as waits:
        quantize_together(weights, curvature, recipe)
    assert waits.calls == ["__bool__", "tolist"]
    for weight, found in zip(weights, quantized, strict=True):
        assert found.output_energy == pytest.approx(energy(weight, curvature.hessian))


def test_fits_that_fail_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all of an input's weights: as if each fit had been asked at once whether it held."""
    few = torch.zeros(24, 96)
    few[:2] = weight_of(2, 96)  # no error in the others, so one of low rank
    weights, curvature = [weight_of(24, 96), few], curvature_for(96)
    recipe = Recipe.named("best", rank=4, group_size=32, low_rank_rounds=2, asymmetry=0.0)
    asked: list[bool] = []
    real = lorc.fit

    def fit(*given: Any) -> tuple[Tensor, Tensor]:
        asked.append(given[5] is None)
        if not careful:
            return real(*given)
        given[5].append(torch.tensor(True))
        return real(*given[:5])

    monkeypatch.setattr(lorc, "fit", fit)
    found = []
    for careful in (False, True):
        found.append(quantize_together(weights, curvature, recipe))
        assert asked == [False] * 3 + [True] * 3 * (not careful)
        asked.clear()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.dequantize(), other.dequantize())
        assert one.factors is not None
        assert one.factors.product().any()
