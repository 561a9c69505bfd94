"""The product's own kernel as a contender (see `peers.py`)."""

from __future__ import annotations

from torch import Tensor


class Ours:
    """E2M1 weights, groups of 128 under M2, FP8 activations, LoRC of some rank in the kernel."""

    weight_bytes: int

    def __init__(self, rows: int, columns: int, copies: int, rank: int) -> None:
        raise NotImplementedError("there is no fused kernel yet")

    @staticmethod
    def size(rows: int, columns: int) -> int:
        return rows * columns // 2

    def prepare(self, tokens: int) -> None:
        raise NotImplementedError

    def multiply(self, copy: int) -> Tensor:
        raise NotImplementedError

    def quantize(self) -> object:
        raise NotImplementedError

    def quantize_and_multiply(self, copy: int) -> Tensor:
        raise NotImplementedError

    def error(self) -> float:
        raise NotImplementedError
