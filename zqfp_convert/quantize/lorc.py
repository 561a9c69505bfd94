"""Low-rank compensation (LoRC): two thin factors that give back most of the rounding error.

ZeroQuant-V2 (arXiv:2303.08302), section 5, takes the singular value decomposition of the error;
in the Hessian's metric the same rank gives back more of the error that the outputs feel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zqfp_convert.numerics import fp8
from zqfp_convert.parallel import ALONE, Share
from zqfp_convert.recipe import FactorFormat

OVERSAMPLING = 8
ITERATIONS, ITERATIONS_AGAIN = 8, 3  # from a random basis, and from one that was good before
DEPENDENT = 1e-6  # what a column keeps at least of its length beside those before it


@dataclass(frozen=True)
class Factors:
    """Encoded factors; the compensation is `B diag(scale) A`.

    Attributes:
        A: float8_e4m3fn or bfloat16 `[r, K]`.
        B: of the same dtype, `[N, r]`.
        scale: float32 `[r]` with E4M3 factors, else None.
    """

    A: Tensor
    B: Tensor
    scale: Tensor | None

    def product(self, rows: slice = slice(None)) -> Tensor:
        """`B diag(scale) A` as float32 `[N, K]`, or some rows of it."""
        return self.B[rows].float() @ self.inner()

    def inner(self) -> Tensor:
        """`diag(scale) A` as float32 `[r, K]`."""
        return self.A.float() if self.scale is None else self.A.float() * self.scale[:, None]


def fit(
    error: Tensor,
    hessian: Tensor | None,
    rank: int,
    share: Share | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The factors `B [N, r]`, `A [r, K]` that minimise `|(E - B A) H^(1/2)|` (Frobenius norm).

    `B` = the leading eigenvectors of `E H E^T`, `A = B^T E`: with `M = E H^(1/2)` the best
    approximation of rank r is `B B^T M`, and the root cancels. H = I when `hessian` is None, which
    is the truncated singular value decomposition of E. The eigenvectors come from subspace
    iteration with a fixed seed (Halko et al., arXiv:0909.4061, algorithm 4.4).

    With a `share` the error is its rows; every process gets all of B and A. `start` is what B was
    (`[n, r]`, the share's rows) for an error much like this one.
    """
    share = share or ALONE.share(len(error))
    sum_ = share.world.sum_
    width = min(rank + OVERSAMPLING, share.total, error.shape[1])
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(share.total, width, generator=generator)[share.here].to(error)
    if start is not None:
        basis[:, : start.shape[1]] = start.to(basis)
    for _ in range(ITERATIONS if start is None else ITERATIONS_AGAIN):
        back = sum_(error.t() @ _orthonormal(basis, share))  # [K, width]
        basis = error @ (back if hessian is None else hessian @ back)
    basis = _orthonormal(basis, share)
    inner = sum_(basis.t() @ error)  # [width, K]
    gram = (inner if hessian is None else inner @ hessian) @ inner.t()
    vectors = torch.linalg.eigh((gram + gram.t()) / 2).eigenvectors  # ascending
    B = basis @ vectors[:, -rank:].flip(1)
    return share.gather(B), sum_(B.t() @ error)


def _orthonormal(basis: Tensor, share: Share) -> Tensor:
    """An orthonormal basis `[N, w]` of what the columns of a float32 matrix, w << N, span.

    By the Cholesky factorization of its Gram matrix, in float64 and twice, as the first time leaves
    an error of the square of the condition (Yamamoto et al., "Roundoff error analysis of the
    CholeskyQR2 algorithm", ETNA 44, 2015). On a GPU that takes a fraction of the time of
    Householder's reflections, which are for columns that depend on one another.
    """
    wide = basis.double()
    for _ in range(2):
        gram = share.world.sum_(wide.t() @ wide)
        sizes = gram.diagonal().sqrt()
        lower, failed = torch.linalg.cholesky_ex(gram / sizes / sizes[:, None])
        if bool(failed) or not bool(lower.diagonal().amin() >= DEPENDENT):  # NaN for zeros
            found: Tensor = torch.linalg.qr(share.gather(basis)).Q[share.here]
            return found
        wide = torch.linalg.solve_triangular(lower.t(), wide / sizes, upper=True, left=False)
    return wide.to(basis.dtype)


def encode(B: Tensor, A: Tensor, form: FactorFormat) -> Factors:
    """Encode float32 factors; E4M3 has one scale for each rank, so the pair loses no range."""
    if form == "bf16":
        return Factors(A.bfloat16(), B.bfloat16(), None)
    codes_A, scale_A = fp8.quantize(A, dim=1)  # scale [r, 1]
    codes_B, scale_B = fp8.quantize(B, dim=0)  # scale [1, r]
    return Factors(codes_A, codes_B, scale_A[:, 0] * scale_B[0])


def size(rank: int, rows: int, columns: int, form: FactorFormat) -> int:
    """Bytes of the factors of a layer `[N, K]` on disk, at most of that rank."""
    rank = min(rank, rows, columns)
    return rank * (rows + columns + 4) if form == "e4m3" else 2 * rank * (rows + columns)
