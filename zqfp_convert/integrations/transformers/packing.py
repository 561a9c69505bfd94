"""Packed layers in a model that `from_pretrained` loads: outlines before, weights after.

transformers loads what is not packed by its own rules; the packed layers are read as
`zqfp_convert.load` reads them. Outlines are buffers that are in no state dict, so that transformers
counts and places them, and asks no file for them.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.errors import OptionError, SourceError
from zqfp_convert.model import skeleton
from zqfp_convert.model.blocks import is_transposed, put
from zqfp_convert.model.experts import Experts
from zqfp_convert.model.unfused import fuse, unfuse
from zqfp_convert.runtime import siblings
from zqfp_convert.runtime.linear import QuantizedLinear
from zqfp_convert.runtime.loader import PackedParts


class Packing:
    """The packed layers of a model, on their way into it and out of it.

    Attributes:
        manifest: of the checkpoint.
        fused: the modules that transformers has for experts, by their names in the model; empty
            ones, in whose places the experts stand one by one.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        """Put outlines of packed layers into a model on the meta device.

        Raises:
            CheckpointError: the checkpoint breaks a rule of the format, or does not fit the model.
            SourceError: its manifest cannot be had from the Hub.
        """
        checkpoint = PackedCheckpoint(_with_manifest(model, folder))
        self.manifest = checkpoint.manifest
        self.fused = unfuse(model)
        whole = type(model).__name__ in (checkpoint.config.get("architectures") or [])
        parts = PackedParts(checkpoint, torch.device("meta"), model=model, headless=not whole)
        self._parts: PackedParts | None = parts
        self._places, self._shared = dict(parts.names.to_model), parts.names.shared
        self._dtypes = _renamed_dtypes(model, self._places)
        self._transposed = set()
        for name in checkpoint.layers:
            place = self._places[name + layout.WEIGHT].removesuffix(layout.WEIGHT)
            if is_transposed(model.get_submodule(place)):
                self._transposed.add(name)
            put(model, place, parts.outline(name))
        _silence(model, "unexpected", ["."])  # of packed layers; what lacks was looked for above
        inside = [f"^{re.escape(path)}" for path in self.fused]
        _silence(model, "missing", inside)  # transformers looks for fused ones

    def fill(self, model: PreTrainedModel) -> None:
        """Read what is not there yet: packed layers, and all else that transformers passes over.

        Raises:
            CheckpointError: a layer breaks a rule of the format.
            OptionError: transformers has split the model up for tensor parallelism.
        """
        if getattr(model, "_tp_size", None) is not None:
            raise OptionError(
                "tp_plan",
                "tensor parallelism of transformers",
                needed="whole layers: packed ones are not split up here",
                do="Use device_map='auto' for several GPUs.",
            )
        parts, self._parts = self._parts, None
        assert parts is not None
        for place, dtype in self._dtypes.items():
            tensor = skeleton.tensor_at(model, place)
            tensor.data = tensor.data.to(dtype)
        parts.refill(model)
        siblings.link(model)
        model._weight_conversions = []  # what is saved has the names on disk already
        _read_weights(model)

    def tensors(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """All tensors by their names on disk, packed ones on the CPU.

        Raises:
            OptionError: the model is another one by now, as with adapters in it.
        """
        state = dict(model.state_dict())
        result = {}
        for name, place in self._places.items():
            layer, _, leaf = name.rpartition(".")
            if layer in self.manifest["layers"]:
                if f".{leaf}" != layout.WEIGHT:
                    continue  # a bias comes with its layer
                path = place.removesuffix(layout.WEIGHT)
                module = model.get_submodule(path)
                if not isinstance(module, QuantizedLinear):
                    raise _changed(path)
                held = module.packed().tensors()
                if module.bias is not None:
                    held[layer + layout.BIAS] = module.bias
                for tensor_name, tensor in held.items():
                    result[tensor_name] = tensor.cpu()
                    del state[path + tensor_name.removeprefix(layer)]
            elif place in state:
                result[name] = state.pop(place)
            else:
                raise _changed(place)
        return result | {n: tensor for n, tensor in state.items() if n not in self._shared}

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        """Put plain layers in the place of packed ones, low-rank factors merged, experts fused."""
        found = [n for n, one in model.named_modules() if isinstance(one, QuantizedLinear)]
        for name in found:
            module = model.get_submodule(name)
            assert isinstance(module, QuantizedLinear)
            plain = _plain(module, dtype or module.dtype, module.name in self._transposed)
            put(model, name, plain)
        for path, module in self.fused.items():
            experts = model.get_submodule(path)
            assert isinstance(experts, Experts)
            put(model, path, fuse(experts, module))
        added = [n for n, change in self.manifest["changed"].items() if change == "bias_added"]
        if added:
            warnings.warn(
                f"{len(added)} linear layers have biases that this architecture lacks (such as "
                f"{added[0]}): saved, the dequantized model could not be loaded with them",
                stacklevel=2,
            )
        del model._weight_conversions  # from here on an ordinary model


def _renamed_dtypes(model: PreTrainedModel, places: dict[str, str]) -> dict[str, torch.dtype]:
    """The dtypes that a model wants for tensors that have other names on disk.

    transformers (seen up to 5.17) takes these as they are on disk where a model is quantized.
    """
    state = model.state_dict()
    renamed = [place for name, place in places.items() if name != place and place in state]
    return {place: state[place].dtype for place in renamed if state[place].is_floating_point()}


def _changed(place: str) -> OptionError:
    return OptionError(
        "save_pretrained",
        f"{place} is not in the model as it was loaded",
        needed="the packed model without adapters in it",
        do="Save adapters with their own save_pretrained, or unload them first.",
    )


def _plain(module: QuantizedLinear, dtype: torch.dtype, transposed: bool) -> nn.Module:
    """The linear layer that a packed one stands for, where it lies."""
    weight, bias = module.weight, module.bias
    if module.input_offset is not None:
        assert bias is not None
        bias = bias.float() - weight.float() @ module.input_offset.float()
    rows, columns = module.out_features, module.in_features
    if transposed:
        with torch.device("meta"):
            plain: nn.Module = Conv1D(rows, columns)
        plain.weight = nn.Parameter(weight.to(dtype).t().contiguous())
    else:
        plain = nn.Linear(columns, rows, bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.to(dtype))
    if bias is not None:
        plain.bias = nn.Parameter(bias.to(dtype))
    elif transposed:
        plain.bias = nn.Parameter(weight.new_zeros(rows, dtype=dtype))
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:  # what accelerate has put there for a model on several devices
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(plain, hook)
    return plain.train(module.training)


def _with_manifest(model: PreTrainedModel, folder: Path) -> Path:
    """The folder; in the Hub's cache, where transformers puts shards alone, with its manifest.

    Raises:
        SourceError: it cannot be downloaded.
    """
    if (folder / layout.MANIFEST_FILE).exists() or folder.parent.name != "snapshots":
        return folder
    name = model.config.name_or_path
    try:
        hf_hub_download(
            name, layout.MANIFEST_FILE, revision=folder.name, cache_dir=folder.parents[2]
        )
    except Exception as error:  # of the transport, of many unrelated kinds
        raise SourceError(
            f"{layout.MANIFEST_FILE} of {name}",
            f"cannot be downloaded, and is not in the cache ({type(error).__name__})",
            needed="the manifest beside the shards",
            do="Check the network; for a private repository run 'hf auth login' or set HF_TOKEN, "
            "as a token in the call does not reach this file.",
        ) from error
    return folder


def _read_weights(model: PreTrainedModel) -> None:
    """Have models that read the weight of a `dt_proj` read it, as they do where nothing is packed.

    Told that they are quantized they call it, so that its input would be rounded to FP8, which
    neither the converter nor `zqfp_convert.load` does there.
    """
    reads = any(isinstance(getattr(m, "dt_proj", None), QuantizedLinear) for m in model.modules())
    for module in model.modules() if reads else ():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)


def _silence(model: PreTrainedModel, kind: str, patterns: list[str]) -> None:
    """Have transformers not warn of tensors whose names have one of the patterns."""
    name = f"_keys_to_ignore_on_load_{kind}"
    found: Any = getattr(model, name)
    together = [*(found or []), *patterns]
    setattr(model, name, set(together) if isinstance(found, set) else together)
