"""The whole method for one weight: target, scales, solver, refinement, low-rank compensation.

This is the file to read first. It knows nothing of models and files.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zqfp_convert.numerics import codebook, scales
from zqfp_convert.numerics.scales import Scales
from zqfp_convert.quantize import lorc
from zqfp_convert.quantize.descent import descend, optimum
from zqfp_convert.quantize.gptq import gptq
from zqfp_convert.quantize.hessian import Curvature, aim_at_original, relative_error
from zqfp_convert.quantize.lorc import Factors
from zqfp_convert.recipe import Recipe

SWEEPS_PER_ROUND = 2  # of coordinate descent after each fit of the low-rank factors


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
    """Quantize `weight` `[N, K]` by the recipe.

    Args:
        weight: any floating dtype, finite.
        curvature: statistics of the layer's inputs; None for a layer without (it is then rounded
            to nearest, and LoRC falls back to the plain decomposition).
    """
    W = weight.float()
    H = None if curvature is None else curvature.hessian
    target = W
    if curvature is not None and curvature.drift is not None and recipe.asymmetry > 0:
        target = aim_at_original(W, curvature.drift, recipe.asymmetry)

    group_size = W.shape[1] if recipe.group_size == "row" else recipe.group_size
    importance = None if H is None else H.diagonal()
    books = codebook.PAIR if recipe.codebooks == "pair" else (codebook.E2M1,)
    chosen = scales.choose(
        target, recipe.scales, recipe.scale_rounding, group_size, importance, books
    )

    if curvature is not None and recipe.solver == "gptq":
        Q = gptq(target, curvature, chosen.marks, chosen.round)
    else:
        Q = scales.dequantize(scales.quantize(target, chosen), chosen)
    if H is not None:
        Q = descend(target, Q, H, chosen.marks, chosen.round, recipe.sweeps)

    factors = None
    rank = min(recipe.rank, *W.shape)
    if rank > 0:
        metric = H if recipe.low_rank == "hessian" else None
        factors = lorc.encode(*lorc.fit(target - Q, metric, rank), recipe.factors)
        if metric is not None:
            for _ in range(recipe.low_rank_rounds):
                rest = target - factors.product()
                Q = descend(rest, Q, metric, chosen.marks, chosen.round, SWEEPS_PER_ROUND)
                factors = lorc.encode(*lorc.fit(target - Q, metric, rank), recipe.factors)

    doubt = None
    if recipe.tune > 0:
        rest = target if factors is None else target - factors.product()
        doubt = rest if H is None else optimum(rest, Q, H)
    codes = scales.quantize(Q, chosen)
    chosen = scales.canonical(codes, chosen)
    error = W - Q if factors is None else W - Q - factors.product()
    return QuantizedWeight(
        codes,
        chosen,
        factors,
        relative_error(error, W, None),
        None if H is None else relative_error(error, W, H),
        doubt,
    )
