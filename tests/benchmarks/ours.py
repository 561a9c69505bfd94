"""The product's own kernels as a contender (see `peers.py`)."""

from __future__ import annotations

import torch
from peers import GROUP, Problem, random_inputs
from torch import Tensor

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.numerics import fp8
from zqfp_convert.runtime import expanded
from zqfp_convert.runtime.kernels.hopper import layout, schedules
from zqfp_convert.runtime.kernels.hopper.expand import expand
from zqfp_convert.runtime.kernels.hopper.linear import HopperWeights, both_parts
from zqfp_convert.runtime.kernels.hopper.multiply import (
    Inputs,
    Matrix,
    flag_count,
    inner_parts,
    multiply,
)
from zqfp_convert.runtime.kernels.hopper.quantize import quantize


class Ours:
    """E2M1 weights, groups of 128 under M2, FP8 activations, LoRC of some rank.

    The path is the one that a model takes, fused or expanded; `multiply` leaves out what makes the
    activations FP8, and z with them.
    """

    def __init__(self, rows: int, columns: int, copies: int, rank: int) -> None:
        self.rows, self.columns, self.rank = rows, columns, rank
        self.problem = Problem(rows, columns)
        A = B = s = None
        if rank:
            A = torch.randn(rank, columns, device="cuda").to(fp8.DTYPE)
            B = torch.randn(rows, rank, device="cuda").to(fp8.DTYPE)
            s = torch.rand(rank, device="cuda") * 0.1 * columns**-0.5
        self.factors = (A, B, s)
        given = self.problem
        layer = PackedLayer(
            "ours", "m2", GROUP, columns, given.packed, given.exponents, given.row_scale, A, B, s
        )
        self.weights = HopperWeights(layer, None)
        self.copies = [layout.Chunks(self.weights.chunks, self.weights.groups)]
        for _ in range(copies - 1):
            self.copies.append(layout.Chunks(self.weights.chunks.clone(), self.weights.groups))
        self.weight_bytes = self.weights.chunks.nbytes

    @staticmethod
    def size(rows: int, columns: int) -> int:
        """Bytes of a copy, nearly."""
        return rows * columns // 2

    def announce(self, tokens: list[int]) -> None:
        """Compile what will be needed."""
        for count in tokens:
            self.prepare(count)
            self.quantize_and_multiply(0)
        torch.cuda.synchronize()

    def prepare(self, tokens: int) -> None:
        """Inputs `[tokens, columns]`, and room for all that comes of them."""
        self.x = random_inputs(tokens, self.columns)
        shape = (tokens, (self.rows,), self.columns)
        self.wide = schedules.prefers_expanded(*shape, self.rank, 0)
        schedule = schedules.choose(*shape, 0)
        device, depth = self.x.device, self.weights.chunks.shape[1]
        self.schedule = schedule.fit(self.weights.groups)
        self.tile = {"expanded": True} if self.wide else vars(self.schedule)
        self.inner = None
        if self.rank:
            steps = -(-self.rank // layout.RANKS)
            size = (inner_parts(tokens), steps, tokens, 2 * layout.RANKS)
            self.inner = torch.empty(size, dtype=torch.bfloat16, device=device)
        if self.wide:
            rows, columns = expanded.matrix_shape(self.rows, self.columns)
            self.matrix = torch.empty(rows, columns, dtype=torch.uint8, device=device)
            padded = tokens + -tokens % expanded.ALIGNMENT
            self.codes = torch.empty(padded, columns, dtype=torch.uint8, device=device)
        else:
            padded = tokens
            size = (depth, tokens, layout.COLUMNS)
            self.codes = torch.empty(size, dtype=torch.uint8, device=device)
        self.token_scale = torch.ones(padded, device=device)
        count = 0 if self.wide else flag_count(self.schedule, tokens, (self.rows,), depth, 0)
        self.flags = torch.zeros(count, dtype=torch.int32, device=device)
        self.y = torch.full((tokens, self.rows), torch.nan, dtype=torch.bfloat16, device=device)
        self.quantize()

    def quantize(self) -> Tensor:
        """Activations to FP8, and z."""
        factors: tuple[list[Tensor], list[Tensor]] = [], []
        if self.inner is not None:
            assert self.weights.inner_factor is not None
            assert self.weights.inner_scale is not None
            factors = [self.weights.inner_factor], [self.weights.inner_scale]
        quantize(self.x, None, *factors, self.codes, self.token_scale, self.inner, self.flags)
        return self.codes

    def multiply(self, copy: int) -> Tensor:
        """The product."""
        chunks, weights = self.copies[copy], self.weights
        if not self.wide:
            matrix = Matrix(chunks, weights.row_factor, None, self.y, weights.outer)
            inputs = Inputs(self.codes, self.token_scale, self.inner)
            multiply(inputs, [matrix], self.schedule, self.flags)
            return self.y
        expand(chunks, self.matrix)
        y = expanded.product(
            self.codes.view(fp8.DTYPE),
            self.token_scale[:, None],
            self.matrix.view(fp8.DTYPE),
            weights.row_factor[: self.matrix.shape[0]],
            self.rows,
        )[: self.x.shape[0]]
        z = None
        if self.inner is not None:
            z = both_parts(self.inner)[:, : self.rank]
        return expanded.finish(y, z, weights.lorc_B, None, torch.bfloat16)

    def quantize_and_multiply(self, copy: int) -> Tensor:
        """Both, as in a model."""
        self.quantize()
        return self.multiply(copy)

    def error(self) -> float:
        """Relative Frobenius error against float32, poisoned before."""
        self.y.fill_(torch.nan)
        have = self.quantize_and_multiply(0)[:256].float()
        codes, scale = fp8.quantize(self.x[:256])
        seen = codes.float() * scale
        want = self.problem.product(seen)
        A, B, s = self.factors
        if A is not None and B is not None and s is not None:
            want += (seen @ A.float().t() * s) @ B.float().t()
        return float((have - want).norm() / want.norm())
