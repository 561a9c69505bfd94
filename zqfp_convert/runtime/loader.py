"""Loads a packed checkpoint as a transformers model whose quantized linears stay packed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.checkpoint.shards import DTYPES
from zqfp_convert.checkpoint.source import hub
from zqfp_convert.errors import CheckpointError
from zqfp_convert.model import skeleton
from zqfp_convert.model.blocks import is_transposed, put
from zqfp_convert.model.device import resolve_device
from zqfp_convert.model.names import NameMap
from zqfp_convert.runtime import siblings
from zqfp_convert.runtime.linear import QuantizedLinear, Scratch


def load(
    path_or_repo: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A working transformers model from a packed checkpoint.

    Args:
        path_or_repo: a folder, or a repository on the Hub.
        device: where to put it; the first GPU when there is one, else the CPU.
        dtype: of everything that is not quantized, and so of the activations; as in the
            checkpoint's configuration when absent.

    Raises:
        CheckpointError: the checkpoint breaks a rule of the format.
        SourceError: it cannot be found, or the installed transformers does not know its model.
        OptionError: the device does not exist.
    """
    target = resolve_device(device)
    parts = PackedParts(PackedCheckpoint(hub.fetch(path_or_repo)), target, dtype)
    model = parts.model
    parts.fill(model, "", list(parts.names.to_model))
    if dtype is not None:
        model.config.dtype = dtype
    model.tie_weights(missing_keys=set(parts.names.unfilled), recompute_mapping=False)
    return model.eval()


class PackedParts:
    """The model of a packed checkpoint without its weights, and what fills any part of it.

    Attributes:
        checkpoint: where the weights are.
        model: the skeleton.
        names: of its tensors; a quantized linear counts as its weight.
        dtype: of everything that is not quantized, and so of the activations.
    """

    def __init__(
        self,
        checkpoint: PackedCheckpoint,
        device: torch.device,
        dtype: torch.dtype | None = None,
        model: PreTrainedModel | None = None,
        headless: bool = False,
    ) -> None:
        """As in `load`.

        Args:
            checkpoint, device, dtype: as there.
            model: the skeleton, where there is one already.
            headless: whether the model may have places that no tensor fills, as those of a head.

        Raises:
            CheckpointError: the checkpoint does not fit its `config.json`.
            SourceError: the installed transformers does not know the model.
        """
        self.checkpoint, self._device, self._cast = checkpoint, device, dtype
        self.model = skeleton.build(checkpoint.folder, device) if model is None else model
        self.dtype = dtype or self.model.dtype
        stored = [name for name in checkpoint.shards.tensors if layout.layer_of(name) is None]
        weights = {layer + layout.WEIGHT: layer for layer in checkpoint.layers}
        self.names = NameMap(self.model, [*stored, *weights])
        _check_fit(checkpoint, self.model, self.names, headless)
        self._layers = weights
        self._biases = {layer + layout.BIAS for layer in checkpoint.layers}
        self._scratch = Scratch()

    def fill(self, module: nn.Module, prefix: str, disk: Iterable[str]) -> None:
        """Give a module, whose names have `prefix` in the model, the tensors of these names.

        Linears of which the weights are packed become `QuantizedLinear`.
        """
        for name in disk:
            place = self.names.to_model[name].removeprefix(prefix)
            if name in self._layers:
                packed = self.checkpoint.layer(self._layers[name])
                bias = self.checkpoint.bias(self._layers[name])
                linear = QuantizedLinear(packed, bias, self._scratch, self.dtype)
                put(module, place.removesuffix(layout.WEIGHT), linear.to(self._device))
            elif name not in self._biases:
                tensor = self.checkpoint.shards.read([name])[name].to(self._device)
                skeleton.assign(module, {place: tensor}, self._cast)
        for whole, name in (self.names.tied_within(prefix) if prefix else {}).items():
            tensor = self.checkpoint.shards.read([name])[name].to(self._device)
            skeleton.assign(module, {whole.removeprefix(prefix): tensor}, self._cast)
        siblings.link(module)

    def outline(self, name: str) -> QuantizedLinear:
        """A quantized linear on the meta device, its tensors no part of a state dict."""
        bias = self.checkpoint.shards.tensors.get(name + layout.BIAS)
        vector = None
        if bias is not None:
            vector = torch.empty(bias.shape, dtype=DTYPES[bias.dtype], device="meta")
        linear = QuantizedLinear(self.checkpoint.outline(name), vector, self._scratch, self.dtype)
        linear._non_persistent_buffers_set = {n for n, _ in linear.named_buffers()}
        return linear

    def refill(self, module: nn.Module) -> None:
        """Give outlines in a module their tensors, and all else its values, wherever they are."""
        for name, place in self.names.to_model.items():
            if name in self._layers:
                linear = module.get_submodule(place.removesuffix(layout.WEIGHT))
                assert isinstance(linear, QuantizedLinear)
                layer = self._layers[name]
                linear.take(self.checkpoint.layer(layer), self.checkpoint.bias(layer))
            elif name not in self._biases:
                tensor = self.checkpoint.shards.read([name])[name]
                skeleton.tensor_at(module, place).data.copy_(tensor)


def _check_fit(
    checkpoint: PackedCheckpoint, model: PreTrainedModel, names: NameMap, headless: bool
) -> None:
    """Hold the checkpoint's tensors to the places and shapes of the model."""
    weights = [layer + layout.WEIGHT for layer in checkpoint.layers]
    lost = [name for name in weights if name not in names.to_model]
    missing = lost or ([] if headless else names.missing)
    if missing:
        raise CheckpointError(
            "missing-tensor",
            str(checkpoint.folder),
            f"no place in the model for {missing[0]}" if lost else f"no tensor for {missing[0]}",
            needed="a checkpoint that fits the model of its config.json",
            do="Install the transformers version that config.json names, or convert again.",
        )
    places = model.state_dict()
    for name, place in names.to_model.items():
        wanted = tuple(places[place].shape)
        layer = name.removesuffix(layout.WEIGHT)
        if layer in checkpoint.manifest["layers"]:
            rows, columns = checkpoint.manifest["layers"][layer]["shape"]
            linear = model.get_submodule(place.removesuffix(layout.WEIGHT))
            found: tuple[int, ...] = (columns, rows) if is_transposed(linear) else (rows, columns)
        else:
            found = checkpoint.shards.tensors[name].shape
        if found != wanted:
            raise CheckpointError(
                "wrong-shape",
                name,
                f"{list(found)}",
                needed=f"{list(wanted)}, by config.json",
                do="Convert the model again: weights and config.json do not belong together.",
            )
