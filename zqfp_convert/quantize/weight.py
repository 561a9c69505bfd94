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
from zqfp_convert.quantize import lorc, ranks
from zqfp_convert.quantize.descent import descend, optimum
from zqfp_convert.quantize.gptq import gptq
from zqfp_convert.quantize.hessian import Curvature, aim_at_original, relative_error
from zqfp_convert.quantize.lorc import Factors
from zqfp_convert.quantize.tensor_cores import tensor_cores
from zqfp_convert.recipe import Recipe

SWEEPS_PER_ROUND = 2  # of coordinate descent after each fit of the low-rank factors
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
    """

    codes: Tensor
    scales: Scales
    factors: Factors | None
    weight_error: float
    output_error: float | None
    doubt: Tensor | None = None

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
        spend: the curvature's mismatch is given up once the targets are known; it takes as much
            memory as the Hessian.
    """
    apart = curvature is None and recipe.rank == 0 and recipe.tune == 0 and world.size == 1
    if apart and all(weight.device.type == "cpu" for weight in weights):
        return [_round_by_rows(weight, recipe) for weight in weights]
    with tensor_cores():
        shares = [world.share(len(weight)) for weight in weights]
        weights = [weight[share.here] for weight, share in zip(weights, shares, strict=True)]
        targets = [weight.float() for weight in weights]
        if curvature is not None:
            targets = [aim_at_original(W, curvature, recipe.asymmetry) for W in targets]
            curvature.mismatch = None if spend else curvature.mismatch
        return _quantize_together(weights, targets, shares, curvature, recipe)


def _quantize_together(
    weights: Sequence[Tensor],
    targets: Sequence[Tensor],
    shares: Sequence[Share],
    curvature: Curvature | None,
    recipe: Recipe,
) -> list[QuantizedWeight]:
    coded = [
        _encode(weight, target, share, curvature, recipe)
        for weight, target, share in zip(weights, targets, shares, strict=True)
    ]
    metric = None if curvature is None or recipe.low_rank == "svd" else curvature.hessian
    rank = recipe.rank
    if rank == "auto":
        errors = ((one.target - one.quantized, one.weight.float()) for one in coded)
        rank = ranks.worthwhile(errors, metric, recipe.factors, shares)
    return [_compensate(one, curvature, metric, rank, recipe) for one in coded]


def _round_by_rows(weight: Tensor, recipe: Recipe) -> QuantizedWeight:
    """Round a weight to nearest, some rows at a time: what that takes stays in the cache."""
    codes, chosen = [], []
    lost = whole = 0.0
    for rows in torch.split(weight, max(1, IN_THE_CACHE // weight.shape[1])):
        W = rows.float()
        coded = _encode(rows, W, ALONE.share(len(rows)), None, recipe)
        assert coded.codes is not None
        codes.append(coded.codes)
        chosen.append(scales.canonical(coded.codes, coded.scales))
        lost += _energy(W - coded.quantized)
        whole += _energy(W)
    error = (lost / whole) ** 0.5 if whole > 0 else 0.0
    return QuantizedWeight(torch.cat(codes), scales.stack(chosen), None, error, None)


def _energy(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())


@dataclass(frozen=True)
class _Coded:
    """A weight on its way, or the rows of a share of it: `[n, K]` out of `[N, K]`.

    `target` is what to aim at, `quantized` the values of its codes under `scales`; `codes` are
    there where nothing is going to change them.
    """

    weight: Tensor
    target: Tensor
    quantized: Tensor
    scales: Scales
    share: Share
    codes: Tensor | None


def _encode(
    weight: Tensor, target: Tensor, share: Share, curvature: Curvature | None, recipe: Recipe
) -> _Coded:
    H = None if curvature is None else curvature.hessian
    group_size = target.shape[1] if recipe.group_size == "row" else recipe.group_size
    importance = None if H is None else H.diagonal()
    books = codebook.PAIR if recipe.codebooks == "pair" else (codebook.E2M1,)
    chosen = scales.choose(
        target, recipe.scales, recipe.scale_rounding, group_size, importance, books
    )

    codes = None
    if curvature is not None and recipe.solver == "gptq":
        Q = gptq(target, curvature, chosen)
    else:
        codes = scales.quantize(target, chosen)
        Q = scales.dequantize(codes, chosen)
    if H is not None:
        Q, codes = descend(target, Q, H, chosen, recipe.sweeps), None
    return _Coded(weight, target, Q, chosen, share, codes)


def _compensate(
    coded: _Coded, curvature: Curvature | None, metric: Tensor | None, rank: int, recipe: Recipe
) -> QuantizedWeight:
    target, Q, chosen = coded.target, coded.quantized, coded.scales
    H = None if curvature is None else curvature.hessian
    factors, share = None, coded.share
    here, world = share.here, share.world
    rank = min(rank, share.total, target.shape[1])
    if rank > 0:
        factors = lorc.encode(*lorc.fit(target - Q, metric, rank, share), recipe.factors)
        if metric is not None:
            for _ in range(recipe.low_rank_rounds):
                rest = target - factors.product(here)
                Q = descend(rest, Q, metric, chosen, SWEEPS_PER_ROUND)
                factors = lorc.encode(*lorc.fit(target - Q, metric, rank, share), recipe.factors)

    doubt = None
    if recipe.tune > 0:
        rest = target if factors is None else target - factors.product(here)
        doubt = rest if H is None else optimum(rest, Q, H)
    codes = scales.quantize(Q, chosen) if coded.codes is None else coded.codes
    chosen = scales.canonical(codes, chosen)
    W = coded.weight.float()
    error = W - Q if factors is None else W - Q - factors.product(here)
    return QuantizedWeight(
        share.gather(codes),
        _whole(chosen, share),
        factors,
        relative_error(error, W, None, world),
        None if H is None else relative_error(error, W, H, world),
        None if doubt is None else share.gather(doubt),
    )


def _whole(chosen: Scales, share: Share) -> Scales:
    """The scales of all rows."""
    return replace(
        chosen,
        factor=share.gather(chosen.factor),
        exponent=share.gather(chosen.exponent),
        raised=round(share.world.total(chosen.raised)),
        choice=None if chosen.choice is None else share.gather(chosen.choice),
    )
