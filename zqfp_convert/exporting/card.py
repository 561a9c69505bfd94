"""The model card of an exported folder: what it is, and how its program loads it."""

from __future__ import annotations

from dataclasses import dataclass

from zqfp_convert.checkpoint import card, layout
from zqfp_convert.exporting import adapter
from zqfp_convert.exporting.opened import Opened


@dataclass(frozen=True)
class Kind:
    """What cards of one format say.

    Attributes:
        title: after the model's name.
        about: what the weights are now.
        library: that loads them; tags: of the model.
        loading: paragraphs on how; adapted: one more, where there is an adapter.
    """

    title: str
    about: str
    library: str
    tags: tuple[str, ...]
    loading: tuple[str, ...]
    adapted: str = ""


IN_TRANSFORMERS = (
    "```python\nfrom transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("FOLDER", device_map="auto")\n```'
)
KINDS = {
    "bf16": Kind(
        "4-bit weights in bfloat16",
        "The 4-bit weights are dequantized to bfloat16 again, so that every program loads them. "
        "They take the memory that bfloat16 takes, and are as close to the original as 4-bit ones.",
        "transformers",
        ("quantized",),
        (card.FOLDER, IN_TRANSFORMERS, "```\nvllm serve FOLDER\n```"),
    ),
    "compressed-tensors": Kind(
        "MXFP4",
        "Weights are MXFP4, activations FP8 with one scale for each token (`mxfp4-pack-quantized` "
        "of compressed-tensors).",
        "transformers",
        ("compressed-tensors", "mxfp4", "fp4", "w4a8", "quantized"),
        (
            card.FOLDER,
            "```\npip install compressed-tensors\n```",
            IN_TRANSFORMERS,
            "```\nvllm serve FOLDER\n```",
        ),
        f"Part of the weights is the LoRA adapter in `{adapter.FOLDER}/`, which has to be loaded "
        f"too: `model.load_adapter` of transformers, or\n\n```\nvllm serve FOLDER --enable-lora "
        f"--lora-modules lorc=FOLDER/{adapter.FOLDER}\n```\n\nand the model `lorc` in requests.",
    ),
    "gguf": Kind(
        "MXFP4 in GGUF",
        "Weights are MXFP4, in one file for llama.cpp with the tokenizer.",
        "gguf",
        ("gguf", "mxfp4", "fp4", "quantized"),
        ("```\nllama-cli -m FILE.gguf\n```",),
        "Part of the weights is the LoRA adapter `lorc-adapter.gguf`, which has to be loaded too: "
        "`--lora lorc-adapter.gguf`.",
    ),
}


def of(opened: Opened, to: str, *, adapted: bool) -> str:
    """The card of a checkpoint in the format `to`; `adapted`: with an adapter beside it."""
    quantization, kind = opened.checkpoint.config[layout.CONFIG_KEY], KINDS[to]
    name, repository = card.original(quantization)
    producer, front = quantization["producer"], card.known(quantization)
    parts = [
        f"# {name.rpartition('/')[2]}, {kind.title}",
        f"{card.linked(name, repository)} with 4-bit floating-point weights, made by "
        f"{producer['name']} {producer['version']}. {kind.about} What the model is for, and what "
        "it is not for, is in the original's card.",
        "## How to load it",
        *kind.loading,
        *([kind.adapted] if adapted else []),
        *card.license_parts(front, repository),
    ]
    return card.whole(parts, front, repository, kind.library, kind.tags)
