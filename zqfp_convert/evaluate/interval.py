"""How far a mean can be trusted: Student's interval, from independent samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from torch import Tensor

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean, and how far to either side its 95 % interval goes; None from a single sample."""

    mean: float
    half: float | None

    def to_json(self) -> dict[str, float | None]:
        """The mean and the ends of its interval, as plain JSON values."""
        low = None if self.half is None else self.mean - self.half
        high = None if self.half is None else self.mean + self.half
        return {"mean": self.mean, "low": low, "high": high}


def interval(samples: Tensor) -> Interval:
    """The mean of independent samples `[n]` with `t s / sqrt(n)`, s their standard deviation."""
    values = samples.double()
    count = len(values)
    if count < 2:
        return Interval(float(values.mean()), None)
    error = float(values.std()) / math.sqrt(count)
    return Interval(float(values.mean()), student(count - 1) * error)


@cache
def student(freedom: int) -> float:
    """The t that Student's |T| with so many degrees of freedom stays under with 95 % probability.

    By bisection on the closed form for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and
    26.7.4), in the angle whose tangent is t / sqrt(freedom).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _probability(middle, freedom) < CONFIDENCE:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(freedom)


def _probability(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return (angle + sine * total) * 2 / math.pi if odd else sine * total
