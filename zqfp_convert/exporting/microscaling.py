"""Packed layers as MXFP4: E2M1 codes, a power of two for every 32 weights of a row.

OCP Microscaling Formats, version 1.0. Nothing is rounded; what would have to be is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.errors import SourceError
from zqfp_convert.numerics import codebook

GROUP = 32
AGAIN = "Convert the model again, with --scales m1 --codebooks e2m1; or export --to bf16."


def check(checkpoint: PackedCheckpoint) -> None:
    """Hold a checkpoint to what MXFP4 can hold; looks at shapes and row scales.

    Raises:
        SourceError: naming what it cannot.
    """
    if checkpoint.books != (codebook.E2M1,):
        raise _refused(str(checkpoint.folder), "codebooks other than E2M1", "E2M1 codes")
    if checkpoint.scales == "free":
        raise _refused(str(checkpoint.folder), "free scales", "scales that are powers of two")
    size = checkpoint.quantization["weights"]["group_size"]
    for layer in checkpoint.layers:
        columns = checkpoint.manifest["layers"][layer]["shape"][1]
        if columns % GROUP or (size != "row" and size % GROUP):
            raise SourceError(
                layer,
                f"{columns} columns in groups of {columns if size == 'row' else size}",
                needed=f"multiples of {GROUP}, the groups of MXFP4",
                do="Export --to bf16; or convert the model again, with other groups, and leave "
                "such layers alone (--ignore).",
            )
    if checkpoint.scales == "m2":
        for layer in checkpoint.layers:
            name = layer + layout.ROW_SCALE
            mantissa, _ = checkpoint.shards.read([name])[name].float().frexp()
            if bool((mantissa != 0.5).any()):
                raise _refused(layer, "row scales (M2) that are no powers of two", "powers of two")


def exponents(layer: PackedLayer) -> Tensor:
    """The E8M0 bytes `[N, K / 32]` of a layer that `check` has passed.

    Rows of zeros, which may have any scale, get the largest of the layer.

    Raises:
        SourceError: a scale beyond what E8M0 holds.
    """
    scale = layer.scale.to(torch.int16)
    if layer.row_scale is not None:
        _, exponent = layer.row_scale.float().frexp()
        scale = scale + (exponent.to(torch.int16) - 1)[:, None]
    zeros = ((layer.packed & 0x77) == 0).all(1)
    if bool(zeros.any()):
        scale[zeros] = layout.E8M0_BIAS if bool(zeros.all()) else int(scale[~zeros].max())
    if int(scale.min()) < 0 or int(scale.max()) >= layout.E8M0_FORBIDDEN:
        raise _refused(
            layer.name,
            f"scales from 2^{int(scale.min()) - layout.E8M0_BIAS} to "
            f"2^{int(scale.max()) - layout.E8M0_BIAS}",
            "scales from 2^-127 to 2^127",
        )
    size = layer.group_size
    return scale.to(torch.uint8).repeat_interleave(size // GROUP, 1)[:, : layer.columns // GROUP]


def _refused(where: str, found: str, needed: str) -> SourceError:
    return SourceError(where, found, needed=f"{needed}, to lose nothing in MXFP4", do=AGAIN)
