"""Low-rank compensation as a LoRA adapter beside the exported model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zqfp_convert.errors import SourceError
from zqfp_convert.exporting.opened import Opened

FOLDER = "lorc-adapter"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def ranks(opened: Opened) -> dict[str, int]:
    """The rank of each layer that has low-rank factors, by names on disk.

    Raises:
        SourceError: an expert has some, which programs do not apply.
    """
    entries = opened.checkpoint.manifest["layers"]
    found = {layer: entries[layer]["rank"] for layer in opened.checkpoint.layers}
    found = {layer: rank for layer, rank in found.items() if rank > 0}
    for layer in found:
        if any(opened.place(layer).startswith(f"{path}.") for path in opened.mixtures):
            raise SourceError(
                layer,
                "low-rank compensation of an expert",
                needed="experts without: adapters of experts are not applied by all programs",
                do="Convert the model again, with --rank 0; or export --to bf16, which merges it.",
            )
    return found


def factors(opened: Opened, layer: str, rank: int) -> tuple[Tensor, Tensor]:
    """`diag(s) A [rank, K]` and `B [N, rank]` in float32, zeros beyond the layer's own rank."""
    found = opened.checkpoint.layer(layer).lorc_factors()
    assert found is not None
    A, B = found
    more = rank - len(A)
    pad = torch.nn.functional.pad
    return pad(A, (0, 0, 0, more)), pad(B, (0, more))


def tensors(opened: Opened, found: dict[str, int]) -> dict[str, Tensor]:
    """All factors, by the names of PEFT."""
    rank = max(found.values())
    result: dict[str, Tensor] = {}
    for layer in found:
        name = f"base_model.model.{opened.place(layer)}"
        A, B = factors(opened, layer, rank)
        result |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    return result


def config(opened: Opened, found: dict[str, int]) -> dict[str, Any]:
    """PEFT's configuration: a LoRA that is added as it is (`lora_alpha` is the rank)."""
    rank = max(found.values())
    places = [opened.place(layer) for layer in found]
    leaves = {place.rpartition(".")[2] for place in places}
    linears = {
        name for name, _ in opened.model.named_modules() if name.rpartition(".")[2] in leaves
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(leaves) if linears == set(places) else sorted(places),
    }
