"""The product's own kernels as a contender (see `peers.py`)."""

from __future__ import annotations

from dataclasses import replace

import torch
from peers import GROUP, Problem, random_inputs
from torch import Tensor

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.numerics import bits, codebook, fp8
from zqfp_convert.numerics.codebook import Codebook
from zqfp_convert.runtime import expanded
from zqfp_convert.runtime.kernels.hopper import layout, schedules
from zqfp_convert.runtime.kernels.hopper.expand import expand
from zqfp_convert.runtime.kernels.hopper.fused import Room, room, room_for_z
from zqfp_convert.runtime.kernels.hopper.linear import HopperWeights, both_parts
from zqfp_convert.runtime.kernels.hopper.multiply import Inputs, Matrix


class Ours:
    """Weights of one codebook or two, groups of 128 under M2, FP8 activations, LoRC of some rank.

    The path is the one that a model takes, fused or expanded; `multiply` leaves out what makes the
    activations FP8, and z with them.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        copies: int,
        rank: int,
        books: tuple[Codebook, ...] = (codebook.E2M1,),
    ) -> None:
        self.rows, self.columns, self.rank = rows, columns, rank
        self.problem = Problem(rows, columns, books=books)
        A = B = s = None
        if rank:
            A = torch.randn(rank, columns, device="cuda").to(fp8.DTYPE)
            B = torch.randn(rows, rank, device="cuda").to(fp8.DTYPE)
            s = torch.rand(rank, device="cuda") * 0.1 * columns**-0.5
        self.factors = (A, B, s)
        given = self.problem
        layer = PackedLayer(
            "ours", "m2", GROUP, columns, given.packed, given.exponents, given.row_scale, A, B, s,
            books=books, choice=bits.pack(given.second) if len(books) > 1 else None,
        )  # fmt: skip
        self.weights = HopperWeights(layer, None)
        chunks = layout.Chunks(self.weights.chunks, self.weights.groups, books)
        self.copies = [chunks]
        for _ in range(copies - 1):
            self.copies.append(replace(chunks, data=chunks.data.clone()))
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
        self.wide = schedules.prefers_expanded(
            tokens, (self.rows,), self.columns, self.rank, self.rank > 0, 0
        )
        self.y = torch.full((tokens, self.rows), torch.nan, dtype=torch.bfloat16, device="cuda")
        if self.wide:
            rows, columns = expanded.matrix_shape(self.rows, self.columns)
            self.matrix = torch.empty(rows, columns, dtype=torch.uint8, device="cuda")
            padded = tokens + -tokens % expanded.ALIGNMENT
            codes = torch.empty(padded, columns, dtype=torch.uint8, device="cuda")
            z = room_for_z(tokens, -(-self.rank // layout.RANKS), codes.device)
            scale = torch.ones(padded, device="cuda")
            self.room = Room(Inputs(codes, scale, z), None, None)
            self.tile = {"expanded": True}
        else:
            self.room = room(self.x, [self._matrix(0)])
            schedule = self.room.schedule
            self.tile = {"decode": True} if schedule is None else vars(schedule)
        self.quantize()

    def _matrix(self, copy: int) -> Matrix:
        weights = self.weights
        return Matrix(self.copies[copy], weights.row_factor, None, self.y, weights.outer)

    def quantize(self) -> Tensor:
        """Activations to FP8, and z."""
        factors: tuple[list[Tensor], list[Tensor]] = [], []
        if self.rank:
            assert self.weights.inner_factor is not None
            assert self.weights.inner_scale is not None
            factors = [self.weights.inner_factor], [self.weights.inner_scale]
        self.room.fill(self.x, None, factors)
        return self.room.inputs.codes

    def multiply(self, copy: int) -> Tensor:
        """The product."""
        if not self.wide:
            self.room.multiply([self._matrix(copy)])
            return self.y
        expand(self.copies[copy], self.matrix)
        inputs = self.room.inputs
        y = expanded.product(
            inputs.codes.view(fp8.DTYPE),
            inputs.token_scale[:, None],
            self.matrix.view(fp8.DTYPE),
            self.weights.row_factor[: self.matrix.shape[0]],
            self.rows,
        )[: self.x.shape[0]]
        z = None
        if inputs.inner is not None:
            z = both_parts(inputs.inner)[:, : self.rank]
        return expanded.finish(y, z, self.weights.lorc_B, None, torch.bfloat16)

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
