"""Quantized linears on Hopper: arranged weights, and the operator that multiplies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.errors import OptionError
from zqfp_convert.numerics import codebook, fp8
from zqfp_convert.runtime import expanded, operators
from zqfp_convert.runtime.kernels.hopper import layout, schedules
from zqfp_convert.runtime.kernels.hopper.expand import expand
from zqfp_convert.runtime.kernels.hopper.fused import Factors, room, room_for_z
from zqfp_convert.runtime.kernels.hopper.layout import Chunks
from zqfp_convert.runtime.kernels.hopper.multiply import MATRICES, Matrix
from zqfp_convert.runtime.kernels.hopper.quantize import STEPS, quantize
from zqfp_convert.runtime.scratch import scratch as scratch_of


class HopperWeights(nn.Module):
    """The one copy of a layer's weights, in the tensor cores' order, and all that goes with it.

    None of its buffers are saved: the layer around it saves them as they lie on disk.
    """

    chunks: Tensor
    row_top: Tensor
    row_factor: Tensor
    bias: Tensor | None
    input_offset: Tensor | None
    inner_factor: Tensor | None
    inner_scale: Tensor | None
    outer: Tensor | None
    lorc_B: Tensor | None

    def __init__(self, layer: PackedLayer, bias: Tensor | None) -> None:
        super().__init__()
        self.rows, self.columns, self.group_size = layer.rows, layer.columns, layer.group_size
        about = layer.group_size, layer.columns, layer.books, layer.choice
        chunks = layout.arrange(layer.packed, layer.scale, *about)
        self.groups, self.books = chunks.groups, chunks.books
        factor = expanded.row_factor(layer.scale, layer.row_scale)
        A, B, s = layer.lorc_A, layer.lorc_B, layer.lorc_scale
        if A is not None:
            s = torch.ones(A.shape[0], device=A.device) if s is None else s.float()
            s = torch.nn.functional.pad(s, (0, -s.shape[0] % layout.RANKS))
        buffers = {
            "chunks": chunks.data,
            "row_top": layer.scale.amax(1),  # uint8 [N]: the largest exponent byte
            "row_factor": layout.by_row(factor),
            "bias": None if bias is None else layout.by_row(bias),
            "input_offset": layer.input_offset,
            "inner_factor": None if A is None else layout.inner_factor(A),
            "inner_scale": s,
            "outer": None if B is None else layout.outer_factor(B),
            "lorc_B": B,
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    @property
    def rank(self) -> int:
        """r, 0 without low-rank factors."""
        return 0 if self.lorc_B is None else self.lorc_B.shape[1]

    def multiply(self, x: Tensor, way: str, scratch: int) -> Tensor:
        """`[M, K]` to `[M, N]`; `way` is fused, expanded or auto."""
        return multiply_all([self], x, way, scratch)[0]

    def prefers_expanded(self, tokens: int, dtype: torch.dtype) -> bool:
        """What `auto` means for M tokens of a dtype."""
        index, rank = self.chunks.device.index or 0, self.rank
        more = rank > 0 or self.bias is not None or dtype != torch.bfloat16
        return schedules.prefers_expanded(tokens, (self.rows,), self.columns, rank, more, index)

    def restore(self) -> tuple[Tensor, Tensor]:
        """The canonical tensors: packed uint8 `[N, ceil(K / 2)]`, exponents uint8 `[N, G]`."""
        chunks = Chunks(self.chunks, self.groups, self.books)
        packed, below = layout.restore(chunks, self.rows, self.columns, self.group_size)
        return packed, self.row_top[:, None] - below


def together(weights: Sequence[HopperWeights]) -> bool:
    """Whether weights that get the same input can be multiplied at once."""

    def about(one: HopperWeights) -> tuple[object, ...]:
        return one.columns, one.groups, one.books, one.rank, one.chunks.device

    first = weights[0]
    steps = len(weights) * -(-first.rank // layout.RANKS)
    return (
        len(weights) <= MATRICES
        and all(about(one) == about(first) for one in weights)
        and all(one.input_offset is None for one in weights)
        and steps <= STEPS
    )


def multiply_all(
    weights: Sequence[HopperWeights], x: Tensor, way: str, scratch: int
) -> list[Tensor]:
    """`[M, K]` to `[M, N]` for each of the weights, which are one, or fit `together`."""
    first = weights[0]
    return operator(
        x,
        [one.rows for one in weights],
        [one.chunks for one in weights],
        first.groups,
        [magnitude for book in first.books for magnitude in book],
        [one.row_factor for one in weights],
        [one.bias for one in weights],
        first.input_offset,
        [one.inner_factor for one in weights if one.inner_factor is not None],
        [one.inner_scale for one in weights if one.inner_scale is not None],
        [one.outer for one in weights if one.outer is not None],
        [one.lorc_B for one in weights if one.lorc_B is not None],
        way,
        scratch,
    )


def _work(
    x: Tensor,
    rows: Sequence[int],
    chunks: Sequence[Tensor],
    groups: int,
    magnitudes: Sequence[float],
    row_factor: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    input_offset: Tensor | None,
    inner_factor: Sequence[Tensor],
    inner_scale: Sequence[Tensor],
    outer: Sequence[Tensor],
    lorc_B: Sequence[Tensor],
    way: str,
    scratch: int,
) -> list[Tensor]:
    """The whole of `y = W^ x^ + B (s (A x^)) + bias`, for weights that get the same input.

    Args:
        x: bfloat16 or float16 `[M, K]`.
        rows: N of each.
        chunks, groups: the weights, see `layout.Chunks`.
        magnitudes: of one codebook after another.
        row_factor: float32 `[ceil(N / 64) * 64]`, of each.
        bias: the same, or None.
        input_offset: bfloat16 `[K]`, or None.
        inner_factor, inner_scale: A and s of each, as `quantize` takes them, or none.
        outer: B of each, as `multiply` takes it, or none.
        lorc_B: B of each as it lies on disk, for the expanded path, or none.
        way: fused, expanded, or auto: whichever is faster for M tokens.
        scratch: key of the buffer for the expanded path.

    Raises:
        OptionError: x is on another device than the weights, or has another K.
    """
    tokens, columns = x.shape
    depth = chunks[0].shape[1]
    if x.device != chunks[0].device or -(-columns // layout.COLUMNS) != depth:
        raise OptionError(
            "the input of a quantized linear",
            f"{columns} features on {x.device}",
            needed=f"chunks of {layout.COLUMNS} features: {depth}, on {chunks[0].device}",
            do="Move the input to the model's device.",
        )
    if not tokens:
        return [x.new_empty(0, count) for count in rows]
    x = x if x.stride(1) == 1 else x.contiguous()
    rank = lorc_B[0].shape[1] if lorc_B else 0
    index = x.device.index or 0
    if way == "auto":
        more = rank > 0 or any(one is not None for one in bias) or x.dtype != torch.bfloat16
        if schedules.prefers_expanded(tokens, tuple(rows), columns, rank, more, index):
            way = "expanded"
    factors, books = (inner_factor, inner_scale), codebook.split(magnitudes)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if way != "expanded":
            matrices = [
                Matrix(
                    Chunks(chunks[i], groups, books),
                    row_factor[i],
                    bias[i],
                    x.new_empty(tokens, rows[i]),
                    outer[i] if rank else None,
                )
                for i in range(len(rows))
            ]
            fused = room(x, matrices)
            fused.fill(x, input_offset, factors)
            fused.multiply(matrices)
            return [matrix.y for matrix in matrices]
        codes, scale, z = _quantized_by_row(x, input_offset, factors, len(rows))
        results = []
        for i, count in enumerate(rows):
            matrix = scratch_of(scratch).matrix(*expanded.matrix_shape(count, columns), x.device)
            expand(Chunks(chunks[i], groups, books), matrix)
            factor, of_row = row_factor[i][: matrix.shape[0]], bias[i]
            y = expanded.product(codes, scale, matrix.view(fp8.DTYPE), factor, count)[:tokens]
            of_row = None if of_row is None else of_row[:count]
            B = lorc_B[i] if rank else None
            results.append(expanded.finish(y, z[i][:, :rank] if z else None, B, of_row, x.dtype))
        return results


def _quantized_by_row(
    x: Tensor, input_offset: Tensor | None, factors: Factors, count: int
) -> tuple[Tensor, Tensor, Sequence[Tensor] | None]:
    """What `_scaled_mm` takes: codes E4M3 `[M', K']` and scales `[M', 1]`; z `[M, .]` of each.

    Some tokens more, for `_scaled_mm`; what they hold does not reach the others.
    """
    tokens, depth = x.shape[0], -(-x.shape[1] // layout.COLUMNS)
    padded = tokens + -tokens % expanded.ALIGNMENT
    codes = x.new_empty(padded, depth * layout.COLUMNS, dtype=torch.uint8)
    token_scale = x.new_empty(padded, dtype=torch.float32)
    steps = sum(factor.shape[0] for factor in factors[0]) // layout.RANKS
    inner = room_for_z(x.shape[0], steps, x.device)
    quantize(x, input_offset, *factors, codes, token_scale, inner, None)
    z = None if inner is None else both_parts(inner).tensor_split(count, 1)
    return codes.view(fp8.DTYPE), token_scale[:, None], z


def both_parts(inner: Tensor) -> Tensor:
    """Of `quantize`, z in bfloat16 `[parts, steps, M, 16]`, to float32 `[M, steps * 8]`.

    Its high and low parts change places from one four tokens to the next; their sum is the same.
    """
    parts, steps, tokens, _ = inner.shape
    z = inner.view(parts, steps, tokens, 2, layout.RANKS).float().sum((0, 3))
    return z.transpose(0, 1).reshape(tokens, -1)


operator = operators.register("hopper_linear", _work)
