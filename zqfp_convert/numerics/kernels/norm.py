"""RMSNorm of activations in one pass over them; plain torch takes six, most of them in float32."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from zqfp_convert.numerics.kernels.casts import narrow, on

# Where a norm rounds: its result in float32, times the weight (or one more than that), rounded
# once; or rounded, times the weight in the narrow dtype.
Form = Literal["once", "once, one more", "twice"]
ELEMENTS = 1024  # that one program holds at least
WIDEST = 16384  # columns that it can hold


def rms_norm(values: Tensor, weight: Tensor, epsilon: float, form: Form) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last dimension of x, `[..., K]`.

    Zhang and Sennrich, "Root mean square layer normalization" (arXiv:1910.07467). K is at most
    `WIDEST`; the dtype, which is kept, bfloat16 or float16, that of the weight `[K]` any.
    """
    columns = values.shape[-1]
    given = values.reshape(-1, columns)
    given = given if given.stride(1) == 1 else given.contiguous()
    out = torch.empty(given.shape, dtype=values.dtype, device=values.device)
    if len(given):
        width = triton.next_power_of_2(columns)
        rows = max(1, ELEMENTS // width)
        with on(given):
            _rms_norm[(triton.cdiv(len(given), rows),)](
                given,
                weight,
                out,
                len(given),
                columns,
                given.stride(0),
                epsilon,
                ROWS=rows,
                WIDTH=width,
                MORE=form == "once, one more",
                TWICE=form == "twice",
                num_warps=min(max(rows * width // 512, 1), 16),
            )
    return out.view(values.shape)


@triton.jit(do_not_specialize=["total"])  # by what it is divisible by
def _rms_norm(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    epsilon: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MORE: tl.constexpr,
    TWICE: tl.constexpr,
) -> None:
    """A program does some rows."""
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = tl.arange(0, WIDTH)[None, :]
    inside = (n < total) & (k < columns)
    values = tl.load(x + n * stride + k, inside, other=0.0).to(tl.float32)
    mean = tl.sum(values * values, 1) / columns
    normal = values * (1.0 / tl.sqrt_rn(mean + epsilon))[:, None]
    by = tl.load(weight + k, k < columns, other=0.0).to(tl.float32)
    if MORE:
        by += 1.0
    if TWICE:
        normal = narrow(normal, out.dtype.element_ty).to(tl.float32)
    tl.store(out + n * columns + k, narrow(normal * by, out.dtype.element_ty), inside)
