"""Builds a model on the meta device from its configuration, and gives its modules weights.

Parameters are empty until `assign` puts tensors there; buffers that no checkpoint holds (rotary
frequencies and the like) are computed at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

from zqfp_convert.errors import SourceError
from zqfp_convert.model.experts import ExpertLinear
from zqfp_convert.model.unfused import unfuse


def build(
    folder: Path, device: torch.device | str = "cpu", *, untied: bool = False
) -> PreTrainedModel:
    """The causal language model of a folder's `config.json`, its parameters on the meta device.

    Experts have linears of their own, see `model/experts.py`. Buffers that are not part of
    checkpoints are made on `device`. `untied`: with an output head of its own, whatever the
    configuration says.

    Raises:
        SourceError: no causal language model that the installed transformers knows.
    """
    config = None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # what comes out is an ordinary model with our modules
        if untied:
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=config.dtype or torch.float32, trust_remote_code=False
            )
    except (ValueError, KeyError, OSError, ImportError, AttributeError, TypeError) as error:
        if config is not None and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise _no_causal(folder, config.model_type) from error
        reason = str(error).strip().splitlines()
        raise SourceError(
            str(folder / "config.json"),
            f"no model can be built from it ({reason[0][:200] if reason else type(error)})",
            needed="a causal language model that the installed transformers knows without the "
            "model's own code",
            do="Upgrade transformers if the model is newer than it.",
        ) from error
    _compute_buffers(model, device)
    unfuse(model)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


def _no_causal(folder: Path, kind: str) -> SourceError:
    return SourceError(
        str(folder / "config.json"),
        f"model_type {kind!r}, which the installed transformers has no causal language model for",
        needed="a model that AutoModelForCausalLM of transformers loads",
        do="Convert a decoder-only model; encoders, and models with encoder and decoder, cannot "
        "be converted.",
    )


def assign(
    model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Give parameters and buffers, named from `model` on, their values.

    Floating values are cast to `dtype`, or without one to the dtype that the skeleton has for them;
    with one, those of experts are not.
    """
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        place = getattr(module, leaf)
        wanted = dtype if dtype is not None and place.is_floating_point() else place.dtype
        if dtype is not None and isinstance(module, ExpertLinear):
            wanted = value.dtype
        if isinstance(place, nn.Parameter):
            module._parameters[leaf] = nn.Parameter(value.to(wanted), requires_grad=False)
        else:
            module._buffers[leaf] = value.to(wanted)


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name."""
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


def empty(module: nn.Module) -> None:
    """Drop the weights of a module: its parameters and saved buffers go back to meta."""
    module.requires_grad_(False)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                meta = torch.empty_like(parameter, device="meta")
                part._parameters[name] = nn.Parameter(meta, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                part._buffers[name] = torch.empty_like(buffer, device="meta")


def _compute_buffers(model: PreTrainedModel, device: torch.device | str) -> None:
    """Compute the buffers that no checkpoint holds, as transformers does when it loads.

    Each gets memory; the model's own initialization then fills it, and passes over the parameters,
    which are on the meta device still.
    """
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device=device)
    model.initialize_weights()
