"""What a packed model has to compute: transformers' own model with dequantized weights.

The checkpoint's weights are decoded by `dequantized.py`, written as a source is, and loaded by
`from_pretrained`; the inputs of the layers that were quantized are quantized where they are
multiplied. Which parameters those are is seen from another loading, of numbers that name layers.
It shares no code with the package.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from dequantized import manifest, read_tensors
from mixtures import QuantizedInputs, dense_weight, fused
from safetensors.torch import save_file
from torch import Tensor, nn


def original(folder: Path) -> hf.PreTrainedModel:
    """The model as transformers loads it, experts run by its own lines."""
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    return loaded.eval()


def reference(source: Path, packed: Path, scratch: Path) -> Callable[[Tensor], Tensor]:
    """The logits `[batch, tokens, vocabulary]` of token ids that a packed model has to give."""
    tensors, before = read_tensors(packed), read_tensors(source)
    layers = {
        name: dense_weight(packed, tensors, name, entry["shape"][1])
        for name, entry in manifest(packed)["layers"].items()
    }
    numbers = {name: torch.full_like(w, 1.0 + i) for i, (name, w) in enumerate(layers.items())}
    nothing = {name: torch.zeros_like(value) for name, value in before.items()}
    marked = _loaded(source, _weights(numbers, nothing, nothing), scratch / "marked")
    names, places = list(layers), {}
    for place, marks in marked.named_parameters():
        found = float(marks.detach().max())
        if 1 <= found <= len(names) and found % 1 == 0:
            places[place] = names[int(found) - 1]
    owners = {place: marked.get_submodule(place.rpartition(".")[0]) for place in places}
    transposed = {places[p] for p, owner in owners.items() if type(owner).__name__ == "Conv1D"}
    turned = {name: w.T if name in transposed else w for name, w in layers.items()}
    model = _loaded(source, _weights(turned, tensors, before), scratch / "dequantized")
    for place, name in places.items():
        if manifest(packed)["changed"].get(f"{name}.bias") == "bias_added":
            bias = nn.Parameter(tensors[f"{name}.bias"], requires_grad=False)
            model.get_submodule(place.rpartition(".")[0]).bias = bias
    quantized = [model.get_parameter(place) for place in places]

    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad(), QuantizedInputs(quantized):
            return model(input_ids=ids, use_cache=False).logits

    return logits


def _weights(
    layers: dict[str, Tensor], tensors: dict[str, Tensor], before: dict[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors of the source, those of the layers replaced, the rest as in `tensors`."""
    weights = {name: tensors.get(name, value) for name, value in before.items()}
    for name, weight in layers.items():
        if f"{name}.weight" in before:
            weights[f"{name}.weight"] = weight.reshape(before[f"{name}.weight"].shape)
    if not all(f"{name}.weight" in before for name in layers):
        parts = {f"{name}.weight": weight for name, weight in layers.items()} | tensors
        weights |= fused(parts, before)
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def _loaded(source: Path, weights: dict[str, Tensor], folder: Path) -> hf.PreTrainedModel:
    folder.mkdir(parents=True)
    for file in source.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return original(folder)
