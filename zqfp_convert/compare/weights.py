"""Quantizes one weight by a configuration: grid, solver, low-rank compensation."""

from __future__ import annotations

from torch import Tensor

from zqfp_convert.compare.configuration import Configuration
from zqfp_convert.compare.formats import FORMATS
from zqfp_convert.compare.placement import Placement, place
from zqfp_convert.quantize import lorc
from zqfp_convert.quantize.gptq import gptq
from zqfp_convert.quantize.hessian import Curvature


def placed_by(configuration: Configuration, weight: Tensor) -> Placement:
    """The grid that a configuration puts under a weight, float32 `[N, K]`."""
    return place(
        weight,
        FORMATS[configuration.weights],
        configuration.group_size or weight.shape[1],
        configuration.scales,
        configuration.scale_rounding,
    )


def solve(
    weight: Tensor, curvature: Curvature | None, configuration: Configuration
) -> tuple[Tensor, int]:
    """Quantize `weight` `[N, K]`, any floating dtype, to what a format other than `none` holds.

    The solver is GPTQ where the configuration says so and `curvature` is given, else rounding.
    GPTQ rounds to a grid that starts at zero, so offsets are taken off before and added after,
    which leaves its errors what they are. LoRC takes the truncated singular value decomposition
    of the error, its factors in E4M3 (ZeroQuant-V2, arXiv:2303.08302, section 5).

    Returns:
        The weight that is left, compensation included, float32 `[N, K]`; and the bits that it
        takes when stored.
    """
    W = weight.float()
    rows, columns = W.shape
    placed = placed_by(configuration, W)
    bits = placed.format.bits * W.numel() + placed.bits
    if configuration.solver == "gptq" and curvature is not None:
        offset = placed.offsets(columns)
        Q = gptq(W - offset, curvature, placed) + offset
    else:
        Q = placed.quantize(W)
    rank = min(configuration.rank, rows, columns)
    if rank > 0:
        factors = lorc.encode(*lorc.fit(W - Q, None, rank), "e4m3")
        Q = Q + factors.product()
        bits += rank * (8 * (rows + columns) + 32)
    return Q, bits
