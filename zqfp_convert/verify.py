"""Proves a checkpoint: whole files, every rule of the format, and an exact cast for every group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.checkpoint.source import hub
from zqfp_convert.checkpoint.source.rotated import rotate_weight
from zqfp_convert.checkpoint.source.source import Source
from zqfp_convert.errors import CheckpointError
from zqfp_convert.model import skeleton
from zqfp_convert.numerics import fp8
from zqfp_convert.original import match
from zqfp_convert.quantize.hessian import relative_error
from zqfp_convert.runtime import expanded


@dataclass(frozen=True)
class Verification:
    """What was proved.

    Attributes:
        layers, groups: how many layers, and groups of weights in them, hold every rule.
        exact: whether the cast FP4 -> FP8 was proved (there is none for free scales).
        errors: with a model to compare with, each layer's relative weight error.
        unchanged: how many tensors equal the model's.
    """

    layers: int
    groups: int
    exact: bool
    errors: dict[str, float]
    unchanged: int

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "ok": True,
            "layers": self.layers,
            "groups": self.groups,
            "exact_cast": self.exact,
            "weight_errors": self.errors,
            "unchanged_tensors": self.unchanged,
        }


def verify(
    checkpoint: str | Path,
    against: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Verify a packed checkpoint, and compare it with the model it was made from.

    Checked are the hash of every shard; every rule of the format; that each code times its shift
    is, in E4M3, the very number that the format says; with `against`, that each layer is as far
    from the original as the manifest says, and all tensors not listed as changed are the same.

    Raises:
        CheckpointError: with the rule that is broken and where.
        SourceError: `against` cannot be read.
    """
    packed = PackedCheckpoint(hub.fetch(checkpoint), check_hashes=True)
    source = None
    if against is not None:
        source = Source(hub.fetch(against))
        if not _held(packed) <= source.shards.tensors.keys():
            match(source, skeleton.build(source.folder))  # experts may lie in one tensor there
    errors: dict[str, float] = {}
    groups = 0
    for done, name in enumerate(packed.layers):
        if progress is not None:
            progress(name, done, len(packed.layers))
        layer = packed.layer(name)
        groups += layer.scale.numel()
        if layer.kind != "free":
            _prove_cast(layer)
        if source is not None:
            errors[name] = _compare(packed, layer, source)
    unchanged = _compare_others(packed, source) if source is not None else 0
    return Verification(len(packed.layers), groups, packed.scales != "free", errors, unchanged)


def _held(packed: PackedCheckpoint) -> set[str]:
    """Names that the model has to have: all but those of packed tensors and of changed ones."""
    plain = {name for name in packed.shards.tensors if layout.layer_of(name) is None}
    return plain - set(packed.manifest["changed"]) | {n + layout.WEIGHT for n in packed.layers}


def _prove_cast(layer: PackedLayer) -> None:
    """Expand to FP8 as the fast paths do, and compare with the format's float32 bit by bit."""
    matrix = torch.empty(layer.rows, layer.columns, dtype=torch.uint8)
    expanded.expand(layer.packed, layer.scale, layer.group_size, matrix, layer.books, layer.choice)
    factor = expanded.row_factor(layer.scale, layer.row_scale)
    cast = fp8.decode(matrix.view(fp8.DTYPE)) * factor[:, None]
    if not torch.equal(cast, layer.dequantize()):
        raise CheckpointError(
            "span",
            layer.name,
            "a weight that changes when it is cast to FP8",
            needed="an exact cast",
            do="Report this: a checkpoint that keeps the format's rules cannot do it.",
        )


def _columns(packed: PackedCheckpoint, layer: PackedLayer, source: Source) -> Tensor:
    """What the columns of a layer were multiplied with: powers of two that its norm's gains lost.

    Tuned gains are not quite those any more.
    """
    norm = packed.manifest["layers"][layer.name].get("balanced")
    if norm is None:
        return torch.ones(layer.columns)
    if norm not in source.shards.tensors or norm not in packed.shards.tensors:
        raise _another_model(norm, "no such tensor")
    before = source.shards.read([norm])[norm].float()
    if "rotated" in packed.manifest["layers"][layer.name]:  # the gain went into the weight before
        before = torch.ones_like(before)
    after = packed.shards.read([norm])[norm].float()
    if before.shape != (layer.columns,) or after.shape != before.shape:
        raise _another_model(norm, f"shape {tuple(before.shape)}")
    ratio = (before / after).abs().log2().round()
    return torch.exp2(ratio.where(ratio.isfinite(), torch.zeros_like(ratio)))


def _turned(
    packed: PackedCheckpoint, layer: PackedLayer, source: Source
) -> Callable[[Tensor], Tensor]:
    """What a rotation of the residual stream made of the layer's weight."""
    entry = packed.manifest["layers"][layer.name]
    if "rotated" not in entry:
        return lambda weight: weight
    norm = entry["rotated"]
    if norm is None:
        return lambda weight: rotate_weight(weight, None)
    if norm not in source.shards.tensors or source.shards.tensors[norm].shape != (layer.columns,):
        raise _another_model(norm, "no such tensor")
    gain = source.shards.read([norm])[norm]
    return lambda weight: rotate_weight(weight, gain)


def _compare(packed: PackedCheckpoint, layer: PackedLayer, source: Source) -> float:
    name = layer.name + layout.WEIGHT
    shape = (layer.rows, layer.columns)
    info = source.shards.tensors.get(name)
    if info is None or info.shape not in (shape, shape[::-1]):
        raise _another_model(name, "no such tensor" if info is None else f"shape {info.shape}")
    stored = source.shards.read([name])[name].float()
    compensation = layer.lorc_product()
    weight = layer.dequantize() if compensation is None else layer.dequantize() + compensation
    said = float(packed.manifest["layers"][layer.name]["weight_error"])
    columns = _columns(packed, layer, source)
    turned = _turned(packed, layer, source)

    def error(original: Tensor) -> float:
        balanced = turned(original) * columns
        return relative_error(balanced - weight, balanced, None)

    # GPT-2 stores [K, N]; a square weight tells its orientation by the error that was written down
    readings = [error(w) for w in (stored, stored.t()) if w.shape == shape]
    found = min(readings, key=lambda reading: abs(reading - said))
    if abs(found - said) > 1e-3 * max(said, 1e-3):
        raise _another_model(name, f"a weight error of {found:.5f}, not the manifest's {said:.5f}")
    return found


def _compare_others(packed: PackedCheckpoint, source: Source) -> int:
    changed = packed.manifest["changed"]
    count = 0
    held = {*packed.shards.tensors, *(layer + layout.WEIGHT for layer in packed.layers)}
    for name in source.shards.tensors:
        if name not in held:
            raise _another_model(name, "a tensor that the checkpoint lacks")
    for name in packed.shards.tensors:
        if layout.layer_of(name) is not None or name in changed:
            continue
        if name not in source.shards.tensors:
            raise _another_model(name, "no such tensor")
        ours, theirs = packed.shards.read([name])[name], source.shards.read([name])[name]
        if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            raise _another_model(name, "another value")
        count += 1
    return count


def _another_model(name: str, found: str) -> CheckpointError:
    return CheckpointError(
        "another-model",
        name,
        f"{found}, compared with the model",
        needed="the model that this checkpoint was made from",
        do="Give that model to --against.",
    )
