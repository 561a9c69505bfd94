"""Random packed layers that keep the rules of the format, straight from bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.numerics import bits, codebook
from zqfp_convert.numerics.codebook import Codebook
from zqfp_convert.numerics.scales import Kind


def random_layer(
    kind: Kind = "m2",
    rows: int = 40,
    columns: int = 72,
    group_size: int = 32,
    rank: int = 0,
    span: int = 11,
    seed: int = 0,
    books: tuple[Codebook, ...] = (codebook.E2M1,),
) -> PackedLayer:
    """Every code, every exponent down to `span` below the row's largest, row scales of any size."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    groups = -(-columns // group_size)
    codes = integers(0, 16, rows, columns + columns % 2).to(torch.uint8)
    if columns % 2:
        codes[:, -1] = 0
    below = integers(0, span + 1, rows, groups)
    below = below - below.amin(1, keepdim=True)
    top = torch.full((rows, 1), 127) if kind == "m2" else integers(110, 130, rows, 1)
    scale = (top - below).to(torch.uint8)
    if kind == "free":
        scale = (torch.rand(rows, groups, generator=generator) + 0.01).bfloat16()
    row_scale = None
    if kind == "m2":
        mantissa = 1 + torch.rand(rows, generator=generator)
        row_scale = (mantissa * 2.0 ** integers(-12, 4, rows)).bfloat16()
    A = B = lorc_scale = None
    if rank:
        A = torch.randn(rank, columns, generator=generator).to(torch.float8_e4m3fn)
        B = torch.randn(rows, rank, generator=generator).to(torch.float8_e4m3fn)
        lorc_scale = 0.1 + torch.rand(rank, generator=generator)
    return PackedLayer(
        "layer",
        kind,
        group_size,
        columns,
        codes[:, 0::2] | codes[:, 1::2] << 4,
        scale,
        row_scale,
        A,
        B,
        lorc_scale,
        books=books,
        choice=bits.pack(integers(0, 2, rows, groups)) if len(books) > 1 else None,
    )
