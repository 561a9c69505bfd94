"""Second-order statistics of a layer's inputs, and what the solvers need of them.

Linears that share their input share one `Curvature`: its factorization is done once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from zqfp_convert.quantize.tensor_cores import tensor_cores

PANELS, PANEL = 8, 512  # how many H is summed up in at most, and the fewest rows of one
SLICE = 2048  # columns that are solved for at a time, to bound the memory


class HessianSum:
    """Accumulates `H = E[x^ x^T]` over the inputs `x^` that a layer will really see.

    With `cross`, also `C = E[x x^T]` with the inputs `x` that the same layer has in the original
    model, for the same tokens. Sums are float32 on the device of the inputs. On a GPU inputs of 16
    bits go to the tensor cores as they are, whose products are exact and whose sums are float32;
    of H only what lies below or on the diagonal is summed up, panel by panel.
    """

    def __init__(self, features: int, *, cross: bool, device: torch.device | str) -> None:
        self.tokens = 0
        self._hessian = torch.zeros(features, features, device=device)
        self._cross = torch.zeros_like(self._hessian) if cross else None

    def add(self, seen: Tensor, original: Tensor | None = None) -> None:
        """Add tokens: `seen` and `original` are `[..., K]`, `original` given if `cross`."""
        seen = seen.reshape(-1, seen.shape[-1])  # [tokens, K]
        self.tokens += seen.shape[0]
        for panel in self._panels():
            _add_product(self._hessian[panel, : panel.stop], seen[:, panel], seen[:, : panel.stop])
        if self._cross is not None:
            assert original is not None
            _add_product(self._cross, original.reshape(-1, original.shape[-1]), seen)

    def mean(self) -> tuple[Tensor, Tensor | None]:
        """H and C (or None), each float32 `[K, K]`; the sums are given up."""
        count = max(self.tokens, 1)
        cross = None if self._cross is None else self._cross.div_(count)
        hessian = self._hessian.div_(count)
        for panel in self._panels():
            hessian[: panel.start, panel] = hessian[panel, : panel.start].t()
        return hessian, cross

    def _panels(self) -> Iterator[slice]:
        """Of rows of H."""
        features = len(self._hessian)
        width = max(PANEL, -(-features // PANELS))
        return (slice(at, min(at + width, features)) for at in range(0, features, width))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left^T right` in float32."""
    if total.is_cuda and left.dtype == right.dtype != torch.float32:
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float().t(), right.float())


@dataclass
class Curvature:
    """What the solvers need to know of a layer's inputs.

    Attributes:
        hessian: H, float32 `[K, K]`, undamped.
        order: int64 `[K]`, the order in which columns are solved.
        factor: unit upper triangular `[K, K]`, in that order: the rows of the Cholesky factor U
            of the inverse of the damped Hessian (`inverse = U^T U`), each over its diagonal
            element. Row j says how the rounding error of column j is paid for by later columns.
        drift: `(C - H) (H + damping I)^-1`, `[K, K]`, or None without C.
        damping: the share of the mean diagonal that was added, after any retries.
        retries: how often the factorization had to be retried with ten times the damping.
    """

    hessian: Tensor
    order: Tensor
    factor: Tensor
    drift: Tensor | None
    damping: float
    retries: int


def prepare(
    hessian: Tensor, cross: Tensor | None, *, damping: float, activation_order: bool
) -> Curvature:
    """Factorize a Hessian `[K, K]` for the solvers; `cross` becomes the drift, in place.

    The factor of the inverse comes from one Cholesky factorization and one triangular inverse:
    with J the reversal of the order and `J H J = L L^T`, `inverse(H) = U^T U` for
    `U = J inverse(L) J`, upper triangular. A factorization that fails is retried with ten times
    the damping.
    """
    diagonal = hessian.diagonal()
    if activation_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    else:
        order = torch.arange(len(diagonal), device=hessian.device)
    reverse = order.flip(0)
    lower, used, retries = _damped_cholesky(hessian[reverse[:, None], reverse], damping)
    if cross is not None:
        cross.sub_(hessian)
        for at in range(0, len(cross), SLICE):
            rows = cross[at : at + SLICE]
            rows[:, reverse] = torch.cholesky_solve(rows[:, reverse].t(), lower).t()
    return Curvature(hessian, order, _inverse_factor(lower), cross, used, retries)


def _inverse_factor(lower: Tensor) -> Tensor:
    """The flipped inverse of a lower triangular matrix, each row over its diagonal element."""
    size = len(lower)
    factor = torch.zeros(size, size, device=lower.device)
    for left in range(0, size, SLICE):  # columns of the inverse are zeros down to their own row
        right = min(left + SLICE, size)
        unit = torch.zeros(size - left, right - left, device=lower.device)
        unit.fill_diagonal_(1.0)
        columns = torch.linalg.solve_triangular(lower[left:, left:], unit, upper=False)
        factor[: size - left, size - right : size - left] = columns.flip(0, 1)
    return factor.div_(factor.diagonal().clone()[:, None])


def aim_at_original(weight: Tensor, drift: Tensor, asymmetry: float) -> Tensor:
    """The target `W* = W + beta W (C - H)(H + damping I)^-1`, `[N, K]`.

    With beta = 1 it is the weight whose outputs on the inputs at hand come nearest, in the least
    squares sense, to what the original weight gives on the original inputs.
    """
    return weight + asymmetry * (weight @ drift)


def relative_error(error: Tensor, weight: Tensor, hessian: Tensor | None) -> float:
    """`sqrt(tr(E H E^T) / tr(W H W^T))` for E, W `[N, K]`; H = I when absent; 0 for W = 0."""
    whole = energy(weight, hessian)
    return (energy(error, hessian) / whole) ** 0.5 if whole > 0 else 0.0


def activation_error(weight: Tensor, rounding: Tensor, hessian: Tensor) -> float:
    """What quantizing the activations alone costs the outputs, relative like `relative_error`.

    `sqrt(sum_k E[(x_k - x^_k)^2] |w_k|^2 / tr(W H W^T))`: roundings of different features are taken
    as uncorrelated.

    Args:
        weight: `[N, K]`.
        rounding: `E[(x - x^)^2]`, `[K]`.
        hessian: `[K, K]`.
    """
    whole = energy(weight, hessian)
    lost = float((weight.float().square().sum(0) * rounding).sum(dtype=torch.float64))
    return (lost / whole) ** 0.5 if whole > 0 else 0.0


def energy(matrix: Tensor, hessian: Tensor | None) -> float:
    """`tr(M H M^T)` for M `[N, K]`; H = I when absent."""
    with tensor_cores():
        weighted = matrix if hessian is None else matrix @ hessian
    return float((weighted * matrix).sum(dtype=torch.float64).clamp_min(0.0))


def _damped_cholesky(matrix: Tensor, damping: float) -> tuple[Tensor, float, int]:
    """The factor, the damping that did, and how many did not; the matrix is changed."""
    diagonal = matrix.diagonal().clone()
    mean = float(diagonal.mean()) or 1.0  # a layer that saw only zeros
    used = damping
    for retries in range(8):
        matrix.diagonal().copy_(diagonal + used * mean)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not bool(failed):
            return lower, used, retries
        used *= 10
    raise AssertionError("a Hessian stayed indefinite under any damping: it holds NaN or infinity")
