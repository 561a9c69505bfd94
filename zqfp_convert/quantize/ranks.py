"""How many ranks of low-rank compensation are worth their bits.

A bit a weight more lowers a quantizer's error energy by 6 dB, a factor of 4. Ranks that lower it
less than their bits would, had the codes had them, are not worth having. This price is the same
for all layers, so it shares the bits out among them although each is seen but once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor

from zqfp_convert.parallel import ALONE, Share
from zqfp_convert.quantize import lorc
from zqfp_convert.quantize.hessian import energy
from zqfp_convert.recipe import FactorFormat

STEP = 8  # what the kernels multiply at once
MOST = 32  # what all fused kernels take; a layer with more would lose them


def at_most(rank: int | Literal["auto"], rows: int, columns: int) -> int:
    """The largest rank that a layer can get by a recipe's `rank`."""
    return min(MOST if rank == "auto" else rank, rows, columns)


def worthwhile(
    errors: Iterable[tuple[Tensor, Tensor]],
    hessian: Tensor | None,
    form: FactorFormat,
    shares: Sequence[Share] | None = None,
) -> int:
    """The rank, for all layers of one input, with the least energy at equal bits: `D 4^b`.

    `D` is the sum of what `energies_left` of each layer, `b` the bits a weight of the factors. The
    energies are relative to each layer's own outputs: to scale queries up and keys down by the same
    leaves the model as it is, so it must not move ranks from one to the other.

    Args:
        errors: for each layer what its codes miss `[N, K]`, and its weight `[N, K]`.
        hessian: of the input they share, `[K, K]`; the identity when absent.
        form: of the factors.
        shares: of the rows of each layer, if that is what there is of both.

    Returns:
        A multiple of 8, 0 to 32; a layer with fewer rows or columns has these as its rank.
    """
    ranks = range(0, MOST + STEP, STEP)
    left, bits, weights = [0.0] * len(ranks), [0] * len(ranks), 0
    for at, (error, weight) in enumerate(errors):
        share = ALONE.share(len(error)) if shares is None else shares[at]
        whole = energy(weight, hessian, share.world) or 1.0
        rows, columns = share.total, weight.shape[1]
        weights += rows * columns
        for i, one in enumerate(energies_left(error, hessian, ranks, form, share)):
            left[i] += one / whole
            bits[i] += 8 * lorc.size(ranks[i], rows, columns, form)
    best = min(range(len(ranks)), key=lambda i: left[i] * 4 ** (bits[i] / weights))
    return ranks[best]


def energies_left(
    error: Tensor,
    hessian: Tensor | None,
    ranks: Sequence[int],
    form: FactorFormat,
    share: Share | None = None,
) -> list[float]:
    """`tr((E - F) H (E - F)^T)` with the first ranks, so many as asked, of the best factors F.

    The factors are rounded as they would be on disk, so no rank promises more than it keeps. With
    P = B^T E H A^T and G = (B^T B) * (A H A^T), element by element, the energy at rank r is
    `tr(E H E^T)` less twice the trace of the first r rows and columns of P, plus the sum of those
    of G. With a `share` the error is its rows.
    """
    share = share or ALONE.share(len(error))
    rank = min(max(ranks), share.total, error.shape[1])
    factors = lorc.encode(*lorc.fit(error, hessian, rank, share), form)
    B, A = factors.B.float(), factors.inner()
    seen = A.t() if hessian is None else hessian @ A.t()  # [K, r]
    gained = share.world.sum_((B[share.here].t() @ (error @ seen)).double().diagonal()).cpu()
    cost = ((B.t() @ B).double() * (A @ seen).double()).cpu()
    whole = energy(error, hessian, share.world)
    left = [whole - 2 * float(gained[:r].sum()) + float(cost[:r, :r].sum()) for r in ranks]
    return [max(one, 0.0) for one in left]
