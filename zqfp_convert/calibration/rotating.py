"""Finds what a rotation of the residual stream has to change, by structure, and proves it.

Linears that take the output of a norm as wide as the stream read it, other linears with that many
rows write to it. Whether that is so is not assumed: the first block, changed accordingly, has to
give rotated hidden states for rotated ones in float64.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zqfp_convert.calibration.folding import consumers, norms_of, same_function
from zqfp_convert.calibration.stream import Call
from zqfp_convert.checkpoint.source.rotated import Rotation, rotate_weight
from zqfp_convert.model.blocks import (
    Blocks,
    bias_of,
    get_linear,
    is_transposed,
    linears,
    shape,
    weight_matrix,
)
from zqfp_convert.model.experts import mixtures
from zqfp_convert.model.names import NameMap
from zqfp_convert.numerics import hadamard

SMALLEST_BLOCK = 16  # of the rotation: smaller ones hardly mix anything


def find_rotation(
    model: PreTrainedModel,
    blocks: Blocks,
    names: NameMap,
    block: nn.Module,
    call: Call,
    hidden: Tensor,
) -> Rotation | None:
    """What to change, or None where the model is not known to allow it.

    Args:
        block: the model's first one, with its weights.
        call, hidden: what that is called with, `[batch, tokens, width]`.
    """
    width = hidden.shape[-1]
    kinds = {tuple((n, type(m)) for n, m in block.named_modules()) for block in blocks.modules}
    if len(kinds) > 1:  # what holds for the first block says nothing of the others
        return None
    if mixtures(block):  # experts and routers get copies of what a norm gives
        return None
    around = _around(model, blocks, names, width)
    if around is None or hadamard.block_of(width) < SMALLEST_BLOCK:
        return None
    embeddings, last_norm, head, tied_to = around
    every = dict(linears(block))
    norms = _norms(block, width)
    read = consumers(block, norms, set(every), call, hidden)
    norm_of = {linear: norm for norm, behind in read.items() for linear in behind}
    writers = [n for n, linear in every.items() if n not in norm_of and shape(linear)[0] == width]
    if not norms or not all(read.values()) or not writers:
        return None
    if not _proved(block, norms, norm_of, writers, (call, hidden)):
        return None

    def disk(place: str, leaf: str) -> list[str]:
        """The names on disk of a tensor in every block."""
        return [
            names.to_disk[f"{blocks.name(i)}.{place}.{leaf}"] for i in range(len(blocks.modules))
        ]

    found = Rotation({head: _disk(names, last_norm)}, set(), set(), {}, embeddings, head, tied_to)
    found.norms[_disk(names, last_norm)] = names.to_disk.get(f"{last_norm}.bias")
    for linear, norm in norm_of.items():
        found.readers.update(zip(disk(linear, "weight"), disk(norm, "weight"), strict=True))
    for norm, module in norms.items():
        biased = isinstance(getattr(module, "bias", None), nn.Parameter)
        biases = disk(norm, "bias") if biased else [None] * len(blocks.modules)
        found.norms.update(zip(disk(norm, "weight"), biases, strict=True))
    for linear in writers:
        found.writers.update(disk(linear, "weight"))
        if bias_of(every[linear]) is not None:
            found.biases.update(disk(linear, "bias"))
    for linear, module in every.items():
        if is_transposed(module) and (linear in norm_of or linear in writers):
            found.transposed.update(disk(linear, "weight"))
    return found


def _around(
    model: PreTrainedModel, blocks: Blocks, names: NameMap, width: int
) -> tuple[set[str], str, str, str | None] | None:
    """Outside the blocks: embeddings on disk, the last norm, the head and what it is tied to."""
    modules = [(n, m) for n, m in model.named_modules() if not n.startswith(blocks.path + ".")]
    norms = [*_norms(dict(modules), width)]
    head = model.get_output_embeddings()
    places = [n for n, m in modules if m is head]
    others = [m for _, m in modules if isinstance(m, nn.Linear) and m is not head]
    tables = {n: m for n, m in modules if isinstance(m, nn.Embedding)}
    wide = all(table.embedding_dim == width for table in tables.values())
    if len(norms) != 1 or not places or others or not tables or not wide:
        return None
    weight = f"{places[0]}.weight"
    tied = weight not in names.to_disk
    entrance = next((n for n, m in modules if m is model.get_input_embeddings()), None)
    if entrance is None:
        return None
    tied_to = names.to_disk.get(f"{entrance}.weight") if tied else None
    if tied and tied_to is None:
        return None
    if any(f"{name}.weight" not in names.to_disk for name in tables):
        return None
    embeddings = {_disk(names, name) for name in tables}
    return embeddings, norms[0], names.to_disk.get(weight, weight), tied_to


def _norms(within: nn.Module | dict[str, nn.Module], width: int) -> dict[str, nn.Module]:
    found = norms_of(within, "Norm", "weight")
    return {
        name: norm for name, norm in found.items() if norm.get_parameter("weight").numel() == width
    }


def _proved(
    block: nn.Module,
    norms: dict[str, nn.Module],
    norm_of: dict[str, str],
    writers: Iterable[str],
    proof: tuple[Call, Tensor],
) -> bool:
    values: dict[str, Tensor] = {}
    gains: dict[str, Tensor] = {}
    for name, norm in norms.items():
        gain = gains[name] = norm.get_parameter("weight").data.double()
        values[f"{name}.weight"] = torch.ones_like(gain)
        shift = getattr(norm, "bias", None)
        if isinstance(shift, nn.Parameter):
            values[f"{name}.bias"] = hadamard.rotate(shift.data.double() / gain)
    for name in (*norm_of, *writers):
        linear = get_linear(block, name)
        gain_of = gains[norm_of[name]] if name in norm_of else None
        weight = rotate_weight(weight_matrix(linear).data.double(), gain_of)
        values[f"{name}.weight"] = weight.t() if is_transposed(linear) else weight
        bias = bias_of(linear)
        if name not in norm_of and bias is not None:
            values[f"{name}.bias"] = hadamard.rotate(bias.data.double())
    return same_function(block, values, proof, hadamard.rotate)


def _disk(names: NameMap, place: str) -> str:
    return names.to_disk[f"{place}.weight"]
