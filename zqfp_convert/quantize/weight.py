"""The whole method for a weight: target, scales, solver, refinement, low-rank compensation.

This is the file to read first. It knows nothing of models and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zqfp_convert.numerics import codebook, scales
from zqfp_convert.numerics.scales import Scales
from zqfp_convert.parallel import ALONE, Share, World
from zqfp_convert.quantize import ranks
from zqfp_convert.quantize.descent import descend, optimum
from zqfp_convert.quantize.gptq import gptq
from zqfp_convert.quantize.hessian import Curvature, aim_at_original, energy_here, relative
from zqfp_convert.quantize.lorc import Factors
from zqfp_convert.quantize.refinement import Coded, apart, below, refine
from zqfp_convert.quantize.tensor_cores import tensor_cores
from zqfp_convert.recipe import Recipe

IN_THE_CACHE = 1 << 16  # weights that the CPU rounds at a time where rows do not meet


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight `[N, K]` in 4 bits.

    Attributes:
        codes: uint8 `[N, K]`.
        scales: of its groups.
        factors: low-rank compensation, or None.
        weight_error: relative Frobenius norm of what is still missing from the weight.
        output_error: the same weighted with the Hessian, so of the layer's outputs; None without.
        doubt: what each element would be if it were not rounded and all others were, float32
            `[N, K]`; None unless the recipe goes on from there.
        output_energy: `tr(W H W^T)` of the original weight W, to which `output_error` is relative;
            None without.
    """

    codes: Tensor
    scales: Scales
    factors: Factors | None
    weight_error: float
    output_error: float | None
    doubt: Tensor | None = None
    output_energy: float | None = None

    def dequantize(self) -> Tensor:
        """The float32 weight `[N, K]` that it stands for, low-rank compensation included."""
        weight = scales.dequantize(self.codes, self.scales)
        return weight if self.factors is None else weight + self.factors.product()


def quantize_weight(weight: Tensor, curvature: Curvature | None, recipe: Recipe) -> QuantizedWeight:
    """Quantize a weight `[N, K]` whose input no other gets; see `quantize_together`."""
    return quantize_together([weight], curvature, recipe)[0]


def quantize_together(
    weights: Sequence[Tensor],
    curvature: Curvature | None,
    recipe: Recipe,
    world: World = ALONE,
    *,
    spend: bool = False,
) -> list[QuantizedWeight]:
    """Quantize weights `[N, K]` of one input by the recipe, all with one rank if that is `auto`.

    Args:
        weights: any floating dtype, finite.
        curvature: statistics of the input; None for layers without (they are then rounded to
            nearest, and LoRC falls back to the plain decomposition).
        world: processes that all have these; each takes some rows of each weight, for rows meet in
            the low-rank factors alone.
        spend: what the curvature knows of the original is given up once the targets are known.
    """
    apart = curvature is None and recipe.rank == 0 and recipe.tune == 0 and world.size == 1
    if apart and all(weight.device.type == "cpu" for weight in weights):
        return [_round_by_rows(weight, recipe) for weight in weights]
    with tensor_cores():
        shares = [world.share(len(weight)) for weight in weights]
        weights = [weight[share.here] for weight, share in zip(weights, shares, strict=True)]
        target = below([weight.float() for weight in weights])
        if curvature is not None:
            assert curvature.outputs is None or len(weights) == 1
            alone = shares[0].here if len(weights) == 1 else slice(None)
            target = aim_at_original(target, curvature, recipe.asymmetry, alone)
            if spend:
                curvature.forget_original()
        return _compensate(_encode(weights, target, shares, curvature, recipe), curvature, recipe)


def _round_by_rows(weight: Tensor, recipe: Recipe) -> QuantizedWeight:
    """Round a weight to nearest, some rows at a time: what that takes stays in the cache."""
    # Filled part by part: parts that wait to be put together would leave holes in the heap.
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    chosen = []
    lost = whole = 0.0
    at_once = max(1, IN_THE_CACHE // weight.shape[1])
    for rows, place in zip(torch.split(weight, at_once), torch.split(codes, at_once), strict=True):
        W = rows.float()
        coded = _encode([rows], W, [ALONE.share(len(rows))], None, recipe)
        assert coded.codes is not None
        place.copy_(coded.codes)
        chosen.append(scales.canonical(coded.codes, coded.grid))
        lost += _energy(W - coded.quantized)
        whole += _energy(W)
    error = (lost / whole) ** 0.5 if whole > 0 else 0.0
    grid = scales.stack(chosen)
    return QuantizedWeight(codes, replace(grid, raised=int(grid.raised)), None, error, None)


def _energy(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())


def _encode(
    weights: Sequence[Tensor],
    target: Tensor,
    shares: Sequence[Share],
    curvature: Curvature | None,
    recipe: Recipe,
) -> Coded:
    H = None if curvature is None else curvature.hessian
    group_size = target.shape[1] if recipe.group_size == "row" else recipe.group_size
    importance = None if H is None else H.diagonal()
    books = codebook.PAIR if recipe.codebooks == "pair" else (codebook.E2M1,)
    chosen = [
        scales.choose(W, recipe.scales, recipe.scale_rounding, group_size, importance, books)
        for W in apart(target, weights)
    ]
    grid = scales.stack(chosen)

    codes = None
    if curvature is not None and recipe.solver == "gptq":
        Q = gptq(target, curvature, grid)
    else:
        codes = scales.quantize(target, grid)
        Q = scales.dequantize(codes, grid)
    if H is not None:
        Q, codes = descend(target, Q, H, grid, recipe.sweeps), None
    return Coded(weights, shares, chosen, grid, target, Q, codes)


def _compensate(coded: Coded, curvature: Curvature | None, recipe: Recipe) -> list[QuantizedWeight]:
    target, Q, shares = coded.target, coded.quantized, coded.shares
    H = None if curvature is None else curvature.hessian
    metric = None if recipe.low_rank == "svd" else H
    rank = recipe.rank
    if rank == "auto":
        errors = zip(coded.each(target - Q), map(Tensor.float, coded.weights), strict=True)
        rank = ranks.worthwhile(errors, metric, recipe.factors, shares)
    factors: Sequence[Factors] | None = None
    if rank > 0:
        Q, factors = refine(coded, metric, rank, recipe)

    doubts: Sequence[Tensor | None] = [None] * len(shares)
    if recipe.tune > 0:
        rest = target if factors is None else coded.without(factors)
        doubts = coded.each(rest if H is None else optimum(rest, Q, H))
    codes = scales.quantize(Q, coded.grid) if coded.codes is None else coded.codes
    return _finished(coded, Q, coded.each(codes), factors or [None] * len(shares), doubts, H)


def _finished(
    coded: Coded,
    quantized: Tensor,
    codes: Sequence[Tensor],
    factors: Sequence[Factors | None],
    doubts: Sequence[Tensor | None],
    hessian: Tensor | None,
) -> list[QuantizedWeight]:
    metrics = [None] if hessian is None else [None, hessian]
    measured = []
    parts = zip(coded.weights, coded.each(quantized), factors, strict=True)
    for (weight, near, compensation), chosen, share in zip(
        parts, coded.scales, coded.shares, strict=True
    ):
        W = weight.float()
        error = W - near
        if compensation is not None:
            error -= compensation.product(share.here)
        numbers = [energy_here(matrix, metric) for metric in metrics for matrix in (error, W)]
        numbers.append(torch.zeros_like(numbers[0]) + chosen.raised)
        measured.append(share.world.sum_(torch.stack(numbers)))
        del W, error  # before those of the next weight are there
    found = []
    # All that is asked of a GPU at once, as it stands idle while somebody who has waited goes on.
    for at, (lost, whole, *of_outputs, raised) in enumerate(torch.stack(measured).tolist()):
        share, own, doubt = coded.shares[at], codes[at], doubts[at]
        found.append(
            QuantizedWeight(
                share.gather(own),
                _whole(scales.canonical(own, coded.scales[at]), round(raised), share),
                factors[at],
                relative(lost, whole),
                relative(*of_outputs) if of_outputs else None,
                None if doubt is None else share.gather(doubt),
                of_outputs[1] if of_outputs else None,
            )
        )
    return found


def _whole(chosen: Scales, raised: int, share: Share) -> Scales:
    """The scales of all rows, with what has been counted in all."""
    return replace(
        chosen,
        factor=share.gather(chosen.factor),
        exponent=share.gather(chosen.exponent),
        raised=raised,
        choice=None if chosen.choice is None else share.gather(chosen.choice),
    )
