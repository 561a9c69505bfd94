"""The format of compressed-tensors, `mxfp4-pack-quantized`, with FP8 activations.

transformers and vLLM read it. Codes lie as they do in ours, scales are E8M0 too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from zqfp_convert.checkpoint import layout
from zqfp_convert.errors import SourceError
from zqfp_convert.exporting import adapter, card, microscaling
from zqfp_convert.exporting.folder import Contents, Piece
from zqfp_convert.exporting.opened import Opened


def contents(opened: Opened) -> Contents:
    """What the folder will hold; of each layer its smallest and largest exponent is noted.

    Raises:
        SourceError: the checkpoint cannot be spelled in this format without loss.
    """
    checkpoint = opened.checkpoint
    microscaling.check(checkpoint)
    for layer in checkpoint.layers:
        if opened.transposed(layer):
            raise SourceError(
                layer,
                "a Conv1D, whose weight lies the other way round",
                needed="linear layers, which compressed-tensors knows",
                do="Export --to bf16.",
            )
        if opened.apart(layer):
            raise SourceError(
                layer,
                "an expert of a model whose experts lie in one tensor",
                needed="a model whose experts have tensors of their own",
                do="Export --to bf16.",
            )
    found = adapter.ranks(opened)
    others, weights = {}, None
    if found:
        others[f"{adapter.FOLDER}/{adapter.CONFIG_FILE}"] = adapter.config(opened, found)
        file = f"{adapter.FOLDER}/{adapter.WEIGHTS_FILE}"
        weights = (file, lambda: adapter.tensors(opened, found))
    shards = checkpoint.shards
    pieces = [_piece(opened, layer) for layer in checkpoint.layers]
    pieces += [
        Piece(name, shards.tensors[name].bytes, partial(_plain, opened, name))
        for name in opened.plain
    ]
    config = {**checkpoint.config, layout.CONFIG_KEY: quantization_config(opened.left_alone())}
    about = card.of(opened, "compressed-tensors", adapted=bool(found))
    return Contents(pieces, config, about, weights, others)


def quantization_config(ignore: set[str]) -> dict[str, Any]:
    """What `config.json` says; `ignore` are the linears that are not packed."""
    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": microscaling.GROUP,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
    }
    activations = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "ignore": sorted(ignore),
        "config_groups": {"group_0": group},
    }


def _piece(opened: Opened, name: str) -> Piece:
    rows, columns = opened.checkpoint.manifest["layers"][name]["shape"]

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        layer = opened.checkpoint.layer(name)
        exponents = microscaling.exponents(layer)
        noted = {name: [int(exponents.min()), int(exponents.max())]}
        return {name + ".weight_packed": layer.packed, name + ".weight_scale": exponents}, noted

    return Piece(name, rows * columns // 2 + rows * columns // microscaling.GROUP, make)


def _plain(opened: Opened, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return opened.checkpoint.shards.read([name]), {}
