"""The model card of a folder that was made of somebody's model: whose, under which licence.

The source's own card speaks of another model, so it is not carried over; what a copy has to say too
(licence, languages) is. A card of packed weights that tells more is made when they are pushed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from zqfp_convert.checkpoint.source.origin import of_card

LIBRARY = "zqfp-convert"
PACKED_TAGS = ("zqfp", "fp4", "w4a8", "quantized")
FOLDER = "`FOLDER` is this folder, or its repository on the Hub."


def known(quantization: dict[str, Any], license_name: str | None = None) -> dict[str, Any]:
    """Licence and languages that a packed checkpoint has on record, for the front matter.

    Args:
        quantization: the `quantization_config`; the format leaves open what it says of the source.
        license_name: the Hub's identifier of a licence, instead.
    """
    card = _source(quantization).get("card")
    found = of_card(card) if isinstance(card, dict) else {}
    if license_name is not None:
        found = {key: value for key, value in found.items() if not key.startswith("license")}
        found["license"] = license_name
    return found


def original(quantization: dict[str, Any]) -> tuple[str, str | None]:
    """What the source is called, and its repository on the Hub, if that is on record."""
    source = _source(quantization)
    name, repository = source.get("name"), source.get("repository")
    repository = repository if isinstance(repository, str) and repository else None
    return repository or (name if isinstance(name, str) and name else "a model"), repository


def linked(name: str, repository: str | None) -> str:
    """A model's name in Markdown, a link where it lies on the Hub."""
    return f"[{repository}](https://huggingface.co/{repository})" if repository else name


def whole(
    parts: Sequence[str],
    front: dict[str, Any],
    repository: str | None,
    library: str,
    tags: Sequence[str],
) -> str:
    """A card from its paragraphs.

    Args:
        parts: Markdown.
        front: from `known`.
        repository: of the original, or None.
        library: that loads the model.
        tags: of the model.
    """
    data = ModelCardData(
        base_model=repository,
        base_model_relation=None if repository is None else "quantized",
        library_name=library,
        pipeline_tag="text-generation",
        tags=list(tags),
        **front,
    )
    text = "\n\n".join(parts)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def license_parts(front: dict[str, Any], repository: str | None) -> list[str]:
    """The last paragraphs of a card: under which licence it is."""
    of = "the model that it was made from" if repository is None else repository
    if "license" not in front:
        return ["## License", f"That of {of}; which one is not on record."]
    given = front["license"]
    named = given if isinstance(given, str) else ", ".join(given)
    return ["## License", f"That of {of}: {front.get('license_name', named)}."]


def packed(quantization: dict[str, Any]) -> str:
    """The card of a packed checkpoint that has just been made."""
    name, repository = original(quantization)
    producer, recipe = quantization["producer"], quantization["recipe"]
    front = known(quantization)
    parts = [
        f"# {name.rpartition('/')[2]}, packed",
        f"{linked(name, repository)} with 4-bit floating-point weights and FP8 activations, in the "
        f"zqfp format. Made by {producer['name']} {producer['version']} with recipe "
        f"{recipe['name']}; the rest of its choices is in `config.json`, the error of each layer "
        "in `zqfp_manifest.json`. What the model is for, and what it is not for, is in the "
        "original's card.",
        "## How to load it",
        FOLDER,
        "```\npip install zqfp-convert\n```",
        '```python\nimport zqfp_convert\n\nmodel = zqfp_convert.load("FOLDER", device="cuda")\n```',
        "transformers' `AutoModelForCausalLM.from_pretrained` loads it after `import "
        "zqfp_convert`, `vllm serve FOLDER` where zqfp-convert is installed. `zqfp-convert push "
        "FOLDER USER/NAME` uploads it with a card that has its size and its quality.",
        *license_parts(front, repository),
    ]
    return whole(parts, front, repository, LIBRARY, PACKED_TAGS)


def _source(quantization: dict[str, Any]) -> dict[str, Any]:
    source = quantization.get("source")
    return source if isinstance(source, dict) else {}
