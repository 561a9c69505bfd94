"""A plain bfloat16 checkpoint: weights dequantized, low-rank compensation merged."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zqfp_convert.checkpoint import layout
from zqfp_convert.exporting import card
from zqfp_convert.exporting.folder import Contents, Piece
from zqfp_convert.exporting.opened import Opened
from zqfp_convert.model.experts import Fused

DTYPE = torch.bfloat16
DTYPE_KEYS = ("dtype", "torch_dtype")
Made = tuple[dict[str, Tensor], dict[str, Any]]


def contents(opened: Opened) -> Contents:
    """What the folder will hold: each weight is rounded to bfloat16 once, compensation included.

    Other tensors of the model's dtype are cast too; those of another one keep it. Experts lie as
    they do in the model that was converted: one by one, or all in one tensor.
    """
    checkpoint = opened.checkpoint
    weights = {layer + layout.WEIGHT: layer for layer in checkpoint.layers}
    together = _together(opened, [*weights, *opened.plain])
    used = {disk for _, rows in together.values() for row in rows for disk in row}
    pieces = [
        Piece(name, _bytes(opened, [name]), partial(_single, opened, name))
        for name in [*weights, *opened.plain]
        if name not in used
    ]
    pieces += [
        Piece(name, _bytes(opened, [d for row in rows for d in row]),
              partial(_fused, opened, name, fused, rows))
        for name, (fused, rows) in together.items()
    ]  # fmt: skip
    config = copy.deepcopy(checkpoint.config)
    del config[layout.CONFIG_KEY]
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.update({key: "bfloat16" for key in DTYPE_KEYS if key in part})
    config = config if "dtype" in config else {**config, "dtype": "bfloat16"}
    return Contents(pieces, config, card.of(opened, "bf16", adapted=False))


def _together(opened: Opened, disk: list[str]) -> dict[str, tuple[Fused, list[list[str]]]]:
    """Tensors that hold all experts of a block: how they lie, and for each expert its parts."""
    places: dict[str, str] = {}  # names on disk by place
    for name in disk:
        if name in opened.names.to_model and name not in opened.names.single:
            places[opened.names.to_model[name]] = name
    found = {}
    for path, experts in opened.mixtures.items():
        for leaf, fused in experts.fused.items():
            rows = [
                [places.get(f"{path}.{expert}.{part}.{fused.leaf}") for part in fused.parts]
                for expert in range(len(experts))
            ]
            named = [[name for name in row if name is not None] for row in rows]
            if named[0]:
                above = named[0][0].rsplit(".", 3)[0]
                found[f"{above}.{leaf}"] = fused, named
    return found


def _bytes(opened: Opened, names: list[str]) -> int:
    entries, tensors = opened.checkpoint.manifest["layers"], opened.checkpoint.shards.tensors
    total = 0
    for name in names:
        entry = entries.get(name.removesuffix(layout.WEIGHT))
        shape = tensors[name].shape if entry is None else entry["shape"]
        total += DTYPE.itemsize * torch.Size(shape).numel()
    return total


def _tensor(opened: Opened, name: str) -> Tensor:
    """A tensor of the plain checkpoint; weights `[N, K]`."""
    layer = name.removesuffix(layout.WEIGHT)
    if name.endswith(layout.WEIGHT) and layer in opened.checkpoint.manifest["layers"]:
        return opened.checkpoint.layer(layer).approximation().to(DTYPE)
    stored = opened.checkpoint.shards.read([name])[name]
    of_layer = name.removesuffix(layout.BIAS) in opened.checkpoint.manifest["layers"]
    return stored.to(DTYPE) if of_layer or stored.dtype == opened.dtype else stored


def _single(opened: Opened, name: str) -> Made:
    tensor = _tensor(opened, name)
    layer = name.removesuffix(layout.WEIGHT)
    if layer in opened.checkpoint.manifest["layers"] and opened.transposed(layer):
        tensor = tensor.t()
    return {name: tensor}, {}


def _fused(opened: Opened, name: str, fused: Fused, rows: list[list[str]]) -> Made:
    whole = torch.empty(fused.shape, dtype=DTYPE)
    for expert, parts in enumerate(rows):
        whole[expert] = fused.join([_tensor(opened, part) for part in parts])
    return {name: whole}, {}
