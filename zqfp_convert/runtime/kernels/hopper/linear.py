"""A quantized linear on Hopper: its arranged weights, and the operator that multiplies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.errors import OptionError
from zqfp_convert.numerics import fp8
from zqfp_convert.runtime import expanded, operators
from zqfp_convert.runtime.kernels.hopper import layout, schedules
from zqfp_convert.runtime.kernels.hopper.expand import expand
from zqfp_convert.runtime.kernels.hopper.layout import Chunks
from zqfp_convert.runtime.kernels.hopper.multiply import flag_count, multiply
from zqfp_convert.runtime.kernels.hopper.quantize import quantize
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
        chunks = layout.arrange(layer.packed, layer.scale, layer.group_size, layer.columns)
        self.groups = chunks.groups
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

    def multiply(self, x: Tensor, way: str, scratch: int) -> Tensor:
        """`[M, K]` to `[M, N]`; `way` is fused, expanded or auto."""
        return operator(
            x,
            self.rows,
            self.chunks,
            self.groups,
            self.row_factor,
            self.bias,
            self.input_offset,
            self.inner_factor,
            self.inner_scale,
            self.outer,
            self.lorc_B,
            way,
            scratch,
        )

    def prefers_expanded(self, tokens: int) -> bool:
        """What `auto` means for M tokens."""
        rank = 0 if self.lorc_B is None else self.lorc_B.shape[1]
        return _prefers_expanded(tokens, self.rows, self.columns, rank, self.chunks.device)

    def restore(self) -> tuple[Tensor, Tensor]:
        """The canonical tensors: packed uint8 `[N, ceil(K / 2)]`, exponents uint8 `[N, G]`."""
        chunks = Chunks(self.chunks, self.groups)
        packed, below = layout.restore(chunks, self.rows, self.columns, self.group_size)
        return packed, self.row_top[:, None] - below


def _prefers_expanded(
    tokens: int, rows: int, columns: int, rank: int, device: torch.device
) -> bool:
    return schedules.prefers_expanded(tokens, rows, columns, rank, device.index or 0)


def _work(
    x: Tensor,
    rows: int,
    chunks: Tensor,
    groups: int,
    row_factor: Tensor,
    bias: Tensor | None,
    input_offset: Tensor | None,
    inner_factor: Tensor | None,
    inner_scale: Tensor | None,
    outer: Tensor | None,
    lorc_B: Tensor | None,
    way: str,
    scratch: int,
) -> Tensor:
    """The whole of `y = W^ x^ + B (s (A x^)) + bias`.

    Args:
        x: bfloat16 or float16 `[M, K]`.
        rows: N.
        chunks, groups: the weights, see `layout.Chunks`.
        row_factor: float32 `[ceil(N / 64) * 64]`.
        bias: the same, or None.
        input_offset: bfloat16 `[K]`, or None.
        inner_factor, inner_scale: A and s, as `quantize` takes them, or None.
        outer: B, as `multiply` takes it, or None.
        lorc_B: B as it lies on disk, for the expanded path, or None.
        way: fused, expanded, or auto: whichever is faster for M tokens.
        scratch: key of the buffer for the expanded path.

    Raises:
        OptionError: x is on another device than the weights, or has another K.
    """
    tokens, columns = x.shape
    if x.device != chunks.device or -(-columns // layout.COLUMNS) != chunks.shape[1]:
        raise OptionError(
            "the input of a quantized linear",
            f"{columns} features on {x.device}",
            needed=f"chunks of {layout.COLUMNS} features: {chunks.shape[1]}, on {chunks.device}",
            do="Move the input to the model's device.",
        )
    if not tokens:
        return x.new_empty(0, rows)
    x = x if x.stride(1) == 1 else x.contiguous()
    rank = 0 if lorc_B is None else lorc_B.shape[1]
    if way == "auto" and _prefers_expanded(tokens, rows, columns, rank, x.device):
        way = "expanded"
    weights = Chunks(chunks, groups)
    inner = None
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if inner_factor is not None:
            steps = inner_factor.shape[0] // layout.RANKS
            inner = x.new_empty(steps, tokens, 2 * layout.RANKS, dtype=torch.bfloat16)
        if way != "expanded":
            depth, device = chunks.shape[1], x.device.index or 0
            schedule = schedules.choose(tokens, rows, columns, groups, device)
            codes = x.new_empty(depth, tokens, layout.COLUMNS, dtype=torch.uint8)
            token_scale = x.new_empty(tokens, dtype=torch.float32)
            count = flag_count(schedule, tokens, rows, depth, device)
            flags = x.new_empty(count, dtype=torch.int32)
            quantize(x, input_offset, inner_factor, inner_scale, codes, token_scale, inner, flags)
            y = x.new_empty(tokens, rows)
            multiply(
                codes, token_scale, inner, weights, outer, row_factor, bias, y, schedule, flags
            )  # fmt: skip
            return y
        matrix = scratch_of(scratch).matrix(*expanded.matrix_shape(rows, columns), x.device)
        expand(weights, matrix)
        # Some tokens more, for `_scaled_mm`; what they hold does not reach the others.
        padded = tokens + -tokens % expanded.ALIGNMENT
        codes = x.new_empty(padded, matrix.shape[1], dtype=torch.uint8)
        token_scale = x.new_empty(padded, dtype=torch.float32)
        flags = x.new_empty(0, dtype=torch.int32)
        quantize(x, input_offset, inner_factor, inner_scale, codes, token_scale, inner, flags)
        y = expanded.product(
            codes.view(fp8.DTYPE),
            token_scale[:, None],
            matrix.view(fp8.DTYPE),
            row_factor[: matrix.shape[0]],
            rows,
        )
        z = None if inner is None else both_parts(inner)[:, :rank]
        return expanded.finish(
            y[:tokens], z, lorc_B, None if bias is None else bias[:rows], x.dtype
        )


def both_parts(inner: Tensor) -> Tensor:
    """Of `quantize`, z in bfloat16 `[steps, M, 16]`, to float32 `[M, steps * 8]`.

    Its high and low parts change places from one four tokens to the next; their sum is the same.
    """
    steps, tokens, _ = inner.shape
    z = inner.view(steps, tokens, 2, layout.RANKS).float().sum(2)
    return z.transpose(0, 1).reshape(tokens, -1)


operator = operators.register("hopper_linear", _work)
