"""What the tensor cores' FP8 accumulation loses: errors of each path against float64.

Relative Frobenius error of the bfloat16 output, for spans of the group exponents from 0 to 11 and
growing K, beside row-wise `torch._scaled_mm` on the same FP8 numbers with fast and with promoted
accumulation (which adds up in float32 after every 128 columns). bfloat16 rounding alone is 1.65e-3.

    python tests/benchmarks/precision.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.numerics import fp8, scales
from zqfp_convert.runtime import expanded
from zqfp_convert.runtime.kernels.hopper.linear import HopperWeights
from zqfp_convert.runtime.scratch import Scratch

TOKENS, ROWS, GROUP = 128, 512, 128
COLUMNS = (1024, 4096, 14336)
SPANS = (0, 6, scales.MAX_SPAN)


def layer(columns: int, span: int) -> PackedLayer:
    """Random codes; exponents anywhere within the span."""
    packed = torch.randint(256, (ROWS, columns // 2), dtype=torch.uint8, device="cuda")
    below = torch.randint(span + 1, (ROWS, columns // GROUP), dtype=torch.uint8, device="cuda")
    exponents = 127 - below + below.amin(1, keepdim=True)
    row_scale = (torch.rand(ROWS, device="cuda") + 0.5).bfloat16()
    return PackedLayer("random", "m2", GROUP, columns, packed, exponents, row_scale)


def library(x: Tensor, given: PackedLayer, fast: bool) -> Tensor:
    """`torch._scaled_mm` on the same numbers."""
    codes, scale = fp8.quantize(x)
    matrix = torch.empty(ROWS, given.columns, dtype=torch.uint8, device="cuda")
    expanded.expand(given.packed, given.scale, GROUP, matrix)
    return torch._scaled_mm(
        codes,
        matrix.view(fp8.DTYPE).t(),
        scale_a=scale,
        scale_b=expanded.row_factor(given.scale, given.row_scale)[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


def errors(columns: int, span: int) -> Iterator[float]:
    """Of fused, expanded, `_scaled_mm` fast and promoted, and of rounding alone."""
    given = layer(columns, span)
    x = torch.randn(TOKENS, columns, dtype=torch.bfloat16, device="cuda")
    codes, scale = fp8.quantize(x)
    want = (codes.double() * scale.double()) @ given.dequantize().double().t()
    weights, scratch = HopperWeights(given, None), Scratch()
    outputs = [
        weights.multiply(x, "fused", scratch.key),
        weights.multiply(x, "expanded", scratch.key),
        library(x, given, fast=True),
        library(x, given, fast=False),
        want.bfloat16(),
    ]
    for output in outputs:
        yield float((output.double() - want).norm() / want.norm())


def main() -> None:
    """Print the table."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.exit("precision.py compares the kernels for Hopper: it needs an H100, H200 or H20.")
    torch.manual_seed(0)
    table = Table(
        title=f"relative error, {torch.cuda.get_device_name()}, torch {torch.__version__}"
    )
    names = ("fused", "expanded", "_scaled_mm fast", "_scaled_mm promoted", "rounding alone")
    for name in ("K", "span", *names, "fused / fast"):
        table.add_column(name, justify="right")
    for columns in COLUMNS:
        for span in SPANS:
            found = list(errors(columns, span))
            cells = [f"{error:.2e}" for error in found]
            table.add_row(str(columns), str(span), *cells, f"{found[0] / found[2]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
