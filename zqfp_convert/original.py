"""Brings a model's source and its skeleton together: a tensor for each place, and their names."""

from __future__ import annotations

from functools import partial

from transformers import PreTrainedModel

from zqfp_convert.checkpoint.source.merged import Merge, MergedShards
from zqfp_convert.checkpoint.source.source import Source
from zqfp_convert.checkpoint.source.split import Slice, SplitShards
from zqfp_convert.errors import CheckpointError, SourceError
from zqfp_convert.model.experts import Fused
from zqfp_convert.model.names import NameMap


def match(source: Source, model: PreTrainedModel) -> NameMap:
    """The names of a source's tensors, which are the model's, one by one, from now on.

    Where all experts of a block lie in one tensor, `source.shards` gives their matrices as tensors
    `…experts.7.gate_proj.weight` instead; where the model has tensors merged or split, it gives
    them so, by the model's names.

    Raises:
        SourceError: a tensor that can neither be taken as it is nor expert by expert.
        CheckpointError: `wrong-shape`, of a tensor that holds experts.
    """
    names = NameMap(model, source.shards.tensors)
    if names.merged:
        merges = {place: Merge(parts, make) for place, (parts, make) in names.merged.items()}
        source.shards = MergedShards(source.shards, merges)
        names = NameMap(model, source.shards.tensors)
        if names.merged:
            raise SourceError(
                next(iter(names.merged)),
                "a tensor that transformers merges or splits, and would again under its new name",
                needed="rules that leave the model's own names alone",
                do="Such models cannot be converted yet.",
            )
    if not names.fused:
        return names
    slices: dict[str, Slice] = {}
    for name, (path, fused) in names.fused.items():
        info = source.shards.tensors[name]
        if info.shape != fused.shape:
            raise CheckpointError(
                "wrong-shape",
                f"{name} in {info.file}",
                f"shape {list(info.shape)}",
                needed=f"{list(fused.shape)}, by config.json",
                do="Download the model again: weights and config.json do not belong together.",
            )
        slices |= _slices(name, path, fused)
    source.shards = SplitShards(source.shards, slices)
    return NameMap(model, source.shards.tensors)


def _slices(name: str, path: str, fused: Fused) -> dict[str, Slice]:
    """The parts of a tensor by their names, which follow its own where it is spelled as usual."""
    above = name.rpartition(".")[0]
    above = above if above.endswith("experts") else path
    count, *rest = fused.shape
    transposed = fused.transposed and fused.leaf == "weight"
    rows, *columns = reversed(rest) if transposed else rest
    shape = (rows // len(fused.parts), *columns)
    return {
        f"{above}.{expert}.{part}.{fused.leaf}": Slice(
            name, expert, shape, partial(fused.part, number=number)
        )
        for expert in range(count)
        for number, part in enumerate(fused.parts)
    }
