"""Loads a packed checkpoint as a transformers model whose quantized linears stay packed."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from zqfp_convert.checkpoint import hub, layout
from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.errors import CheckpointError
from zqfp_convert.model import skeleton
from zqfp_convert.model.blocks import is_transposed, put
from zqfp_convert.model.device import resolve_device
from zqfp_convert.model.names import NameMap
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
    checkpoint = PackedCheckpoint(hub.fetch(path_or_repo))
    model = skeleton.build(checkpoint.folder, target)
    stored = [name for name in checkpoint.shards.tensors if layout.layer_of(name) is None]
    biases = {layer + layout.BIAS for layer in checkpoint.layers}
    names = NameMap(model, [*stored, *(layer + layout.WEIGHT for layer in checkpoint.layers)])
    _check_fit(checkpoint, model, names)

    for name in set(stored) - biases:
        if name in names.to_model:
            tensor = checkpoint.shards.read([name])[name].to(target)
            skeleton.assign(model, {names.to_model[name]: tensor}, dtype)
    scratch = Scratch()
    for layer in checkpoint.layers:
        packed, bias = checkpoint.layer(layer), checkpoint.bias(layer)
        module = QuantizedLinear(packed, bias, scratch, dtype or model.dtype)
        place = names.to_model[layer + layout.WEIGHT].removesuffix(layout.WEIGHT)
        put(model, place, module.to(target))
    if dtype is not None:
        model.config.dtype = dtype
    model.tie_weights(missing_keys=set(names.unfilled), recompute_mapping=False)
    return model.eval()


def _check_fit(checkpoint: PackedCheckpoint, model: PreTrainedModel, names: NameMap) -> None:
    """Hold the checkpoint's tensors to the places and shapes of the model."""
    weights = [layer + layout.WEIGHT for layer in checkpoint.layers]
    lost = [name for name in weights if name not in names.to_model]
    missing = lost or names.missing
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
