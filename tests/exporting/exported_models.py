"""What an exported model has to compute: the original with weights decoded by the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from dequantized import dense, manifest, read_tensors
from torch import Tensor, nn

import zqfp_convert

DEMO = Path(zqfp_convert.__file__).parent / "demo" / "model"
Packer = Callable[..., Path]


def source_of(checkpoint: Path) -> Path:
    """The model that `packed` made it from."""
    return checkpoint.with_name("source")


def plain(folder: Path, **options: Any) -> hf.PreTrainedModel:
    """A model as transformers loads it."""
    return hf.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def weights(checkpoint: Path, *, merged: bool) -> dict[str, Tensor]:
    """The dequantized weight of each layer, float64 `[N, K]`; with its compensation if `merged`."""
    tensors = read_tensors(checkpoint)
    found = {}
    for name in manifest(checkpoint)["layers"]:
        layer = dense(checkpoint, tensors, name)
        found[name] = layer.weight
        if merged and layer.lorc is not None:
            found[name] = layer.weight + layer.lorc[1] @ layer.lorc[0]
    return found


def dequantized(
    checkpoint: Path, dtype: torch.dtype = torch.bfloat16, *, merged: bool = False
) -> hf.PreTrainedModel:
    """The plain model with these weights, rounded once, and the other tensors of the checkpoint.

    Of models of plain linears, whose tensors have the same names on disk.
    """
    model = plain(source_of(checkpoint), dtype=dtype)
    found = {f"{n}.weight": w for n, w in weights(checkpoint, merged=merged).items()}
    tensors = read_tensors(checkpoint)
    plainly = {n: t for n, t in tensors.items() if n.endswith((".weight", ".bias"))}
    for name, tensor in {**plainly, **found}.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        turned = name in found and not isinstance(module, nn.Linear)
        value = (tensor.T if turned else tensor).to(dtype)
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    if "lm_head.weight" not in tensors:
        model.tie_weights()
    return model


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """`[batch, tokens, vocabulary]`."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def relative(error: Tensor, whole: Tensor) -> float:
    return float(error.double().norm() / whole.double().norm())
