"""The packed checkpoint that is exported, beside the model that it belongs to."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.errors import SourceError
from zqfp_convert.model.blocks import is_transposed
from zqfp_convert.model.experts import Experts, mixtures
from zqfp_convert.runtime.loader import PackedParts


class Opened:
    """A packed checkpoint, its hashes checked, and the skeleton of its model.

    Attributes:
        checkpoint: the checkpoint.
        model: without weights; experts have linears of their own.
        names: of tensors on disk and in the model; a packed layer counts as its weight.
        plain: names on disk of all tensors but the packed ones.
        dtype: that the model has by its configuration.
        mixtures: the experts, by their names in the model.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder.

        Raises:
            CheckpointError: the checkpoint breaks a rule of its format.
            SourceError: transformers does not know the model, or it computes what no plain model
                can: a bias where the architecture has none, an offset of the activations.
        """
        self.checkpoint = PackedCheckpoint(folder, check_hashes=True)
        parts = PackedParts(self.checkpoint, torch.device("cpu"))
        self.model, self.names, self.dtype = parts.model, parts.names, parts.dtype
        tensors = self.checkpoint.shards.tensors
        self.plain = [name for name in tensors if layout.layer_of(name) is None]
        self.mixtures: dict[str, Experts] = mixtures(self.model)
        for layer in self.checkpoint.layers:
            if layer + layout.INPUT_OFFSET in tensors:
                raise _refused(layer, "an offset of the activations", "layers without")
            if layer + layout.BIAS in tensors and layer + layout.BIAS not in self.names.to_model:
                raise _refused(
                    layer,
                    "a bias, which the architecture has not (from the mean of a LayerNorm)",
                    "a checkpoint without, since other programs would leave it out",
                )

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.checkpoint.folder

    def place(self, layer: str) -> str:
        """The name of a packed layer's module in the model."""
        return self.names.to_model[layer + layout.WEIGHT].removesuffix(layout.WEIGHT)

    def transposed(self, layer: str) -> bool:
        """Whether a plain checkpoint of the model has the weight as `[K, N]`."""
        return is_transposed(self.model.get_submodule(self.place(layer)))

    def apart(self, layer: str) -> bool:
        """Whether it is an expert's matrix that other programs know only together with others."""
        weight = layer + layout.WEIGHT
        inside = any(self.place(layer).startswith(f"{path}.") for path in self.mixtures)
        return inside and weight not in self.names.single

    def left_alone(self) -> set[str]:
        """Linears that are not packed, by their names on disk and in the model."""
        packed = {self.place(layer) for layer in self.checkpoint.layers}
        found = {
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name not in packed
        }
        embeddings = {n for n, m in self.model.named_modules() if isinstance(m, nn.Embedding)}
        for name in self.plain:  # routers, which some programs have as linears
            module = self.names.to_model.get(name, name).removesuffix(layout.WEIGHT)
            matrix = len(self.checkpoint.shards.tensors[name].shape) == 2
            if name.endswith(layout.WEIGHT) and matrix and module not in embeddings:
                found |= {module, name.removesuffix(layout.WEIGHT)}
        return found


def _refused(layer: str, found: str, needed: str) -> SourceError:
    return SourceError(
        layer, found, needed=needed, do="Convert the model again, with --offset none."
    )
