"""What the tests of the solvers share: an independent E2M1 grid, and problems with correlations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
MIDDLE = (VALUES[1:] + VALUES[:-1]) / 2


def on_grid(values: np.ndarray) -> np.ndarray:
    """The nearest E2M1 values, ties to even, in float64."""
    low, high = (np.searchsorted(MIDDLE, np.abs(values), side) for side in ("left", "right"))
    return np.sign(values) * VALUES[np.where(low % 2 == 0, low, high)]


def nearest(values: Tensor, scale: Tensor) -> Tensor:
    grid = on_grid((values / scale).double().numpy())
    return torch.from_numpy(grid).float() * scale


class OnGrid:
    """A grid of E2M1 for the solvers, with a scale for each element `[N, K]`."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def marks(self, columns: Tensor) -> Tensor:
        return self.scale[:, columns]

    def round(self, values: Tensor, marks: Tensor) -> Tensor:
        return nearest(values, marks)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_hessian(features: int, seed: int = 0, decades: float = 1.0) -> Tensor:
    """`E[x x^T]` of inputs that are mixtures, spread over so many powers of ten."""
    mix = normal(features, features, seed=seed) * torch.logspace(0, -decades, features)[:, None]
    inputs = (normal(4 * features, features, seed=seed + 1) @ mix).double()
    inputs *= torch.exp(normal(features, seed=seed + 2))
    return (inputs.t() @ inputs / len(inputs)).float()
