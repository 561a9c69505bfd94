"""What a packed model has to compute: transformers' own model with dequantized weights.

The checkpoint's weights are decoded by `dequantized.py`, written as a source is, and loaded by
`from_pretrained`; the inputs of the layers that were quantized are quantized where they are
multiplied. Which parameters those are is seen from another loading, of numbers that name layers.
It shares no code with the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from dequantized import manifest, read_tensors
from fused_experts import joined, layouts
from mixtures import QuantizedInputs, dense_weight
from safetensors.torch import save_file
from torch import Tensor, nn

PACKED = (
    *(".weight_packed", ".weight_scale", ".weight_row_scale", ".weight_codebook"),
    *(".lorc_A", ".lorc_B", ".lorc_scale", ".input_offset"),
)


def original(folder: Path) -> hf.PreTrainedModel:
    """The model as transformers loads it, experts run by its own lines."""
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    return loaded.eval()


def reference(source: Path, packed: Path, scratch: Path) -> Callable[[Tensor], Tensor]:
    """The logits `[batch, tokens, vocabulary]` of token ids that a packed model has to give."""
    tensors, before = read_tensors(packed), read_tensors(source)
    notes = manifest(packed)
    layers = {
        f"{name}.weight": dense_weight(packed, tensors, name, entry["shape"][1])
        for name, entry in notes["layers"].items()
    }
    own = {name: t for name, t in tensors.items() if not name.endswith(PACKED)}
    added = {name for name, kind in notes["changed"].items() if kind == "bias_added"}
    fused = layouts(own | layers, before)
    if not layers.keys() <= before.keys():  # some may be merged only while they are loaded
        loaded = {n: p.detach() for n, p in original(source).named_parameters() if p.ndim == 3}
        found = {(owner, layout[0]) for owner, layout in fused.values()}
        others = layouts(own | layers, loaded).items()
        fused |= {n: one for n, one in others if (one[0], one[1][0]) not in found}
        before = loaded | before
    owners_of_fused = tuple(f"{owner}.experts." for owner, _ in fused.values())

    def checkpoint(weights: dict[str, Tensor], rest: dict[str, Tensor]) -> dict[str, Tensor]:
        plain = {**rest, **weights}.items()
        whole = {n: t for n, t in plain if n not in added and not n.startswith(owners_of_fused)}
        for name, (owner, layout) in fused.items():
            made = joined(rest | weights, owner, layout, before[name])
            assert made is not None
            whole[name] = made
        return whole

    names, places = list(layers), {}
    numbers = {name: torch.full_like(w, 1.0 + i) for i, (name, w) in enumerate(layers.items())}
    nothing = {name: torch.zeros_like(value) for name, value in own.items()}
    shapes = {n: v.reshape(before[n].shape) if n in before else v for n, v in numbers.items()}
    marked = _loaded(packed, checkpoint(shapes, nothing), scratch / "marked")
    for place, marks in marked.named_parameters():
        found = float(marks.detach().max())
        if 1 <= found <= len(names) and found % 1 == 0:
            places[place] = names[int(found) - 1]
    owners = {place: marked.get_submodule(place.rpartition(".")[0]) for place in places}
    transposed = {places[p] for p, owner in owners.items() if type(owner).__name__ == "Conv1D"}
    turned = {name: w.T if name in transposed else w for name, w in layers.items()}
    model = _loaded(packed, checkpoint(turned, own), scratch / "dequantized")
    for place, name in places.items():
        bias = name.removesuffix("weight") + "bias"
        if notes["changed"].get(bias) == "bias_added":
            value = nn.Parameter(tensors[bias], requires_grad=False)
            model.get_submodule(place.rpartition(".")[0]).bias = value
    quantized = [model.get_parameter(place) for place in places]

    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad(), QuantizedInputs(quantized):
            return model(input_ids=ids, use_cache=False).logits

    return logits


def _loaded(packed: Path, weights: dict[str, Tensor], folder: Path) -> hf.PreTrainedModel:
    folder.mkdir(parents=True)
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    model, about = hf.AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="eager", output_loading_info=True
    )
    assert not about["missing_keys"], about["missing_keys"]
    return model.eval()
