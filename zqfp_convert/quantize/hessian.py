"""Second-order statistics of a layer's inputs, and what the solvers need of them.

Linears that share their input share one `Curvature`: its factorization is done once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from zqfp_convert.parallel import ALONE, World
from zqfp_convert.quantize.substitution import divide
from zqfp_convert.quantize.tensor_cores import product_of_parts, split, tensor_cores

PANELS, PANEL = 8, 1024  # how many H is summed up in at most, and the fewest rows of one
SLICE = 2048  # rows of H that are put in order at a time, to bound the memory
COLUMNS = 512  # of H that are multiplied with at a time in float32, likewise


class HessianSum:
    """Accumulates `H = E[x^ x^T]` over the inputs `x^` that a layer will really see.

    With `cross`, also `C = E[x x^T]` with the inputs `x` that the same layer has in the original
    model, for the same tokens; with `rows`, `W C = E[(W x) x^T]` instead, for a weight W of so many
    rows. Sums are float32 on the device of the inputs. On a GPU what has 16 bits goes to the
    tensor cores as it is, whose products are exact and whose sums are float32; of H only what lies
    below or on the diagonal is summed up, panel by panel.
    """

    def __init__(
        self,
        features: int,
        *,
        cross: bool,
        device: torch.device | str,
        rows: int | None = None,
    ) -> None:
        self.tokens = 0
        self._hessian = torch.zeros(features, features, device=device)
        width = features if rows is None else rows
        self._cross = torch.zeros(width, features, device=device) if cross else None

    def add(self, seen: Tensor, original: Tensor | None = None) -> None:
        """Add tokens: `seen` is `[..., K]`, `original`, given if `cross`, x or `W x` for these."""
        seen = seen.reshape(-1, seen.shape[-1])  # [tokens, K]
        self.tokens += seen.shape[0]
        for panel in self._panels():
            _add_product(self._hessian[panel, : panel.stop], seen[:, panel], seen[:, : panel.stop])
        if self._cross is not None:
            assert original is not None
            _add_product(self._cross, original.reshape(-1, original.shape[-1]), seen)

    def sum_over(self, world: World) -> None:
        """Add what other processes have seen."""
        for total in (self._hessian, self._cross):
            if total is not None:
                world.sum_(total)
        self.tokens = round(world.total(self.tokens))

    def mean(self) -> tuple[Tensor, Tensor | None]:
        """H, float32 `[K, K]`, and C or W C (or None), `[., K]`; the sums are given up."""
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
        factor: L, float32 `[K, K]`, lower triangular: `L L^T` is the damped Hessian, its columns in
            the reverse of that order.
        mismatch: `C - H`, `[K, K]`, or None without C.
        outputs: `W C`, `[N, K]`, where it is known of the one weight W of this input instead of C.
        damping: the share of the mean diagonal that was added, after any retries.
        retries: how often the factorization had to be retried with ten times the damping.
    """

    hessian: Tensor
    order: Tensor
    factor: Tensor
    mismatch: Tensor | None
    damping: float
    retries: int
    outputs: Tensor | None = None

    def pull(self, weight: Tensor, rows: slice) -> Tensor | None:
        """`W (C - H)`, `[n, K]`, for some rows of a weight, `[n, K]`; None where C is not known."""
        if self.mismatch is not None:
            return weight @ self.mismatch
        if self.outputs is None:
            return None
        # A small difference of two large matrices, so the product has to be one of float32.
        pull, parts = self.outputs[rows].clone(), split(weight)
        for at in range(0, len(self.hessian), COLUMNS):
            columns = slice(at, at + COLUMNS)
            pull[:, columns] -= product_of_parts(parts, split(self.hessian[:, columns]))
        return pull

    def forget_original(self) -> None:
        """Give up what is known of the original's inputs; C takes as much memory as H."""
        self.mismatch = self.outputs = None

    def feedback(self, start: int, end: int) -> Tensor:
        """Columns of R, upper triangular, `R R^T` the damped Hessian in the order of solving.

        They say what errors before and in a column mean to it. R is L turned upside down and left
        to right, so it is not stored.

        Returns:
            The rows of these columns that are not zeros, float32 `[end, end - start]`.
        """
        size = len(self.factor)
        return self.factor[size - end :, size - end : size - start].flip(0, 1)


def prepare(
    hessian: Tensor,
    cross: Tensor | None,
    *,
    damping: float,
    activation_order: bool,
    outputs: Tensor | None = None,
) -> Curvature:
    """Factorize a Hessian `[K, K]` for the solvers; `cross` becomes the mismatch, in place.

    `outputs` is `W C`, `[N, K]`, of the one weight that will be solved, where that is known instead
    of `cross`. A factorization that fails is retried with ten times the damping. All of it happens
    in one matrix.
    """
    diagonal = hessian.diagonal()
    if activation_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    else:
        order = torch.arange(len(diagonal), device=hessian.device)
    factor, used, retries = _damped_cholesky(hessian, order.flip(0), damping)
    mismatch = None if cross is None else cross.sub_(hessian)
    return Curvature(hessian, order, factor, mismatch, used, retries, outputs)


def _damped_cholesky(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float, int]:
    """The lower factor L of the matrix in that order, the damping that did, how many did not."""
    mean = hessian.diagonal().mean()
    mean = torch.where(mean == 0, 1.0, mean)  # a layer that saw only zeros
    used = damping
    for retries in range(8):
        matrix = _ordered(hessian, order)
        matrix.diagonal().add_(used * mean)
        columns = matrix.t()  # as LAPACK wants it, so that nothing is copied
        failed = torch.empty((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(columns, out=(columns, failed))
        if not bool(failed):
            return columns, used, retries
        del matrix, columns  # before the next one is made
        used *= 10
    raise AssertionError("a Hessian stayed indefinite under any damping: it holds NaN or infinity")


def _ordered(hessian: Tensor, order: Tensor) -> Tensor:
    matrix = torch.empty_like(hessian)
    for some, rows in zip(torch.split(order, SLICE), torch.split(matrix, SLICE), strict=True):
        torch.index_select(hessian.index_select(0, some), 1, order, out=rows)
    return matrix


def aim_at_original(
    weight: Tensor, curvature: Curvature, asymmetry: float, rows: slice = slice(None)
) -> Tensor:
    """The target `W* = W + beta W (C - H)(H + damping I)^-1`, `[N, K]`; W itself without C.

    With beta = 1 it is the weight whose outputs on the inputs at hand come nearest, in the least
    squares sense, to what the original weight gives on the original inputs. `rows` says which ones
    of the weight these are.
    """
    pull = None if asymmetry == 0 else curvature.pull(weight, rows)
    if pull is None:
        return weight
    order = curvature.order.flip(0)
    pull = pull.index_select(1, order)
    divide(pull, curvature.factor)
    pull = pull.index_select(1, torch.argsort(order))
    return pull.mul_(asymmetry).add_(weight)


def relative_error(error: Tensor, weight: Tensor, hessian: Tensor | None) -> float:
    """`sqrt(tr(E H E^T) / tr(W H W^T))` for E, W `[N, K]`; H = I when absent; 0 for W = 0."""
    energies = torch.stack([energy_here(error, hessian), energy_here(weight, hessian)])
    return relative(*energies.tolist())


def activation_energy(weight: Tensor, rounding: Tensor) -> Tensor:
    """What quantizing the activations alone costs the outputs, to be set beside `tr(W H W^T)`.

    `sum_k E[(x_k - x^_k)^2] |w_k|^2`: roundings of different features are taken as uncorrelated.

    Args:
        weight: `[N, K]`.
        rounding: `E[(x - x^)^2]`, `[K]`.

    Returns:
        float64 `[]`.
    """
    return (weight.float().square().sum(0) * rounding).sum(dtype=torch.float64)


def energy(matrix: Tensor, hessian: Tensor | None, world: World = ALONE) -> float:
    """`tr(M H M^T)` for M `[N, K]`, of which processes have some rows each; H = I when absent."""
    return max(world.total(float(energy_here(matrix, hessian))), 0.0)


def energy_here(matrix: Tensor, hessian: Tensor | None) -> Tensor:
    """The same of the rows at hand, float64 `[]`: nobody has waited for a GPU that computes it.

    By rounding it may lie below 0.
    """
    with tensor_cores():
        weighted = matrix if hessian is None else matrix @ hessian
    rows = (weighted * matrix).sum(1)  # in float64 from here on: all elements in it would be a copy
    return rows.sum(dtype=torch.float64)


def relative(lost: float, whole: float) -> float:
    """What a lost energy is of a whole one, as a ratio of sizes; 0 where there is nothing."""
    return (max(lost, 0.0) / whole) ** 0.5 if whole > 0 else 0.0
