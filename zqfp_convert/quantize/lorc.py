"""Low-rank compensation (LoRC): two thin factors that give back most of the rounding error.

ZeroQuant-V2 (arXiv:2303.08302), section 5, takes the singular value decomposition of the error;
in the Hessian's metric the same rank gives back more of the error that the outputs feel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from zqfp_convert.numerics import fp8
from zqfp_convert.parallel import ALONE, Share
from zqfp_convert.quantize import eigen
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
    later: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The factors `B [N, r]`, `A [r, K]` that minimise `|(E - B A) H^(1/2)|` (Frobenius norm).

    `B` = the leading eigenvectors of `E H E^T`, `A = B^T E`: with `M = E H^(1/2)` the best
    approximation of rank r is `B B^T M`, and the root cancels. H = I when `hessian` is None, which
    is the truncated singular value decomposition of E. The eigenvectors come from subspace
    iteration with a fixed seed (Halko et al., arXiv:0909.4061, algorithm 4.4).

    With a `share` the error is its rows; every process gets all of B and A. `start` is what B was
    (`[n, r]`, the share's rows) for an error much like this one. Errors of one shape may be a
    stack, `[..., N, K]`, and so are their factors then.

    Columns of a basis that depend on one another, as with an error of low rank, are seen at the
    end, and all is done anew with more care. A GPU has to be waited for to know. With a list
    `later` it is not, up to a rank of 24 (`eigen.WIDEST` less `OVERSAMPLING`): whether there were
    none, bool `[]`, is appended, and if not the factors are zeros.
    """
    share = share or ALONE.share(error.shape[-2])
    width = min(rank + OVERSAMPLING, share.total, error.shape[-1])
    at_first = _random(share.total, width, error.device)[share.here].to(error.dtype)
    at_first = at_first.expand(*error.shape[:-2], -1, -1)
    if start is not None:
        at_first = torch.cat([start.to(at_first), at_first[..., start.shape[-1] :]], dim=-1)
    iterations = ITERATIONS if start is None else ITERATIONS_AGAIN

    cholesky = _Cholesky(share)
    basis, inner, gram = _leading(error, hessian, share, at_first, iterations, cholesky)
    held = cholesky.held() & gram.isfinite().all()
    if later is not None:
        later.append(held)
        basis, inner, gram = (torch.where(held, found, 0.0) for found in (basis, inner, gram))
    elif not bool(held):
        # All processes go one way: what is factorized are sums over them, the same bits in each.
        householder = partial(_householder, share=share)
        basis, inner, gram = _leading(error, hessian, share, at_first, iterations, householder)
    # Those of other hosts may find other signs, so one decides.
    leading = share.world.send_(eigen.leading(gram, rank).contiguous(), 0)
    return _whole(basis @ leading, share), leading.mT @ inner


def _whole(rows: Tensor, share: Share) -> Tensor:
    """A matrix, or a stack `[..., N, w]`, of which each process has its rows."""
    return share.gather(rows.movedim(-2, 0)).movedim(0, -2)


@lru_cache(maxsize=8)
def _random(rows: int, width: int, device: torch.device) -> Tensor:
    """Normally distributed float32 `[rows, width]`, kept: they take the CPU long."""
    with torch.inference_mode(False):
        return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(device)


def _leading(
    error: Tensor,
    hessian: Tensor | None,
    share: Share,
    basis: Tensor,
    iterations: int,
    orthonormal: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal basis Q `[n, w]` of where E H E^T is large, `Q^T E` and `Q^T E H E^T Q`."""
    sum_ = share.world.sum_
    for _ in range(iterations):
        back = sum_(error.mT @ orthonormal(basis))  # [K, w]
        basis = error @ (back if hessian is None else hessian @ back)
    basis = orthonormal(orthonormal(basis))  # to the last bit now
    inner = sum_(basis.mT @ error)  # [w, K]
    return basis, inner, (inner if hessian is None else inner @ hessian) @ inner.mT


class _Cholesky:
    """Makes bases orthonormal by the Cholesky factorizations of their Gram matrices, in float64.

    On a GPU that takes a fraction of the time of Householder's reflections, which are for columns
    that depend on one another, and it need not be waited for: whether the factorizations held is
    asked when all are done. Once leaves an error of the square of the condition, twice does not
    (Yamamoto et al., "Roundoff error analysis of the CholeskyQR2 algorithm", ETNA 44, 2015).
    """

    def __init__(self, share: Share) -> None:
        """Of matrices of which these are the rows."""
        self._share = share
        self._sizes: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._failed: list[Tensor] = []

    def __call__(self, basis: Tensor) -> Tensor:
        """A basis `[n, w]` of what the columns of a float32 matrix `[n, w]`, w << N, span."""
        wide = basis.double()
        gram = self._share.world.sum_(wide.mT @ wide)
        lower, failed = torch.linalg.cholesky_ex(gram)
        # The squares of what the columns measure, and what is left of that.
        self._sizes.append(gram.diagonal(dim1=-2, dim2=-1))
        self._kept.append(lower.diagonal(dim1=-2, dim2=-1))
        self._failed.append(failed)
        found: Tensor = torch.linalg.solve_triangular(lower.mT, wide, upper=True, left=False)
        return found.to(basis.dtype)

    def held(self) -> Tensor:
        """Whether no column depended on those before it, bool `[]`: not for NaN, nor for zeros."""
        alone = torch.stack(self._kept) > DEPENDENT * torch.stack(self._sizes).sqrt()
        return alone.all() & (torch.stack(self._failed) == 0).all()


def _householder(basis: Tensor, share: Share) -> Tensor:
    """An orthonormal basis `[n, w]` that spans a matrix's columns, however they depend."""
    found: Tensor = torch.linalg.qr(_whole(basis, share)).Q[..., share.here, :]
    return found


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
