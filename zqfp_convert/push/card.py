"""The model card of a checkpoint: what it is, how close, how to load it, how it was made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.card import LIBRARY, PACKED_TAGS, known, license_parts, linked, whole
from zqfp_convert.report.choices import choices, spelled_bits
from zqfp_convert.report.facts import OTHERS, Facts
from zqfp_convert.report.wording import interval, size


def card(
    facts: Facts,
    repository: str,
    *,
    base_model: str | None,
    license_name: str | None,
    picture: bool,
) -> str:
    """A model card in Markdown, with its metadata.

    Args:
        facts: of the checkpoint; names in it are to be shown to strangers.
        repository: where the card will lie.
        base_model: the repository of the model that was converted, if it has one.
        license_name: the Hub's identifier of a licence; by default that of the source's card.
        picture: whether the report's picture lies beside the card.
    """
    front = known(facts.quantization, license_name)
    parts = [
        f"# {repository.rpartition('/')[2]}",
        *_about(facts, base_model),
        *_size(facts),
        *_quality(facts, repository, base_model, picture=picture),
        *_loading(repository),
        *_made(facts),
        *license_parts(front, base_model),
    ]
    return whole(parts, front, base_model, LIBRARY, PACKED_TAGS)


def _about(facts: Facts, base_model: str | None) -> Iterator[str]:
    name = (facts.quantization["source"] or {}).get("name") or "a model"
    free = facts.quantization["weights"]["scales"] == "free"
    yield (
        f"{linked(name, base_model)} with 4-bit floating-point weights (FP4) and FP8 activations, "
        "in the zqfp format of zqfp-convert. "
        + (
            "Its scales are any numbers (free scales), so it runs on the reference path alone, "
            "without FP8 tensor cores."
            if free
            else "Every weight is *exactly* an FP8 number once it is unpacked, so Hopper GPUs "
            "(H100, H200, H20), which have no FP4 units, multiply it on their FP8 tensor cores. It "
            "runs on other GPUs and on the CPU too."
        )
    )


def _size(facts: Facts) -> Iterator[str]:
    before = size(facts.bytes_before) if facts.bytes_before else "not on record"
    smaller = (
        f" ({facts.bytes_before / facts.bytes_after:.2f} times smaller)"
        if facts.bytes_before
        else ""
    )
    yield "## Size"
    yield "\n".join(
        [
            "| | before | here |",
            "|---|---|---|",
            f"| all tensors | {before} | {size(facts.bytes_after)}{smaller} |",
            f"| bits a quantized weight | {_stored(facts)} | {facts.bits:.3f} |",
        ]
    )
    yield (
        f"{facts.weights:,} weights in {len(facts.layers):,} linear layers are quantized; all "
        f"other tensors have the precision that they had. {spelled_bits(facts)}"
    )


def _stored(facts: Facts) -> str:
    if not facts.bytes_before or not facts.weights:
        return "-"
    return f"{8 * (facts.bytes_before - facts.sizes[OTHERS]) / facts.weights:.3g}"


def _quality(
    facts: Facts, repository: str, base_model: str | None, *, picture: bool
) -> Iterator[str]:
    yield "## How close it is"
    found = facts.evaluation
    if found is None:
        yield (
            "It has not been measured as a whole; the error of every layer is in "
            f"`{layout.MANIFEST_FILE}`."
        )
    else:
        yield "\n".join(
            [
                "| text | tokens | perplexity | original | mean KL | median KL | 99% of KL "
                "| same top token |",
                "|---|---|---|---|---|---|---|---|",
                *(_row(text) for text in found["texts"]),
            ]
        )
        yield (
            "KL(original ‖ this model) of the next token's distribution in nats, ± the 95% "
            f"interval over windows of {found['window']:,} tokens. All figures, by position too, "
            f"are in `{layout.EVALUATION_FILE}`."
        )
    if picture:
        yield f"![Size, errors by layer, and how close it is]({layout.REPORT_PICTURE})"
    against = base_model or "MODEL"
    yield "Measure it on your own text, or prove that it is whole and keeps the format's rules:"
    yield (
        f"```\nzqfp-convert evaluate {repository} --against {against} --text TEXT.txt\n"
        f"zqfp-convert verify {repository}\n```"
    )


def _row(text: dict[str, Any]) -> str:
    cells = (
        _cell(text["text"]),
        f"{text['tokens']:,}",
        f"{text['perplexity']:.3f}",
        f"{text['original_perplexity']:.3f}",
        interval(text["kl"]),
        f"{text['kl_median']:.4f}",
        f"{text['kl_99']:.3f}",
        f"{text['same_top']:.2%}",
    )
    return f"| {' | '.join(cells)} |"


def _loading(repository: str) -> Iterator[str]:
    yield "## How to load it"
    yield "```\npip install zqfp-convert\n```"
    yield "By itself (the result is a transformers model):"
    yield (
        "```python\nimport zqfp_convert\n\n"
        f'model = zqfp_convert.load("{repository}", device="cuda")\n```'
    )
    yield "In transformers:"
    yield (
        "```python\nimport zqfp_convert  # else transformers goes on without the weights\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repository}", device_map="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repository}")\n```'
    )
    yield "In vLLM, with zqfp-convert installed beside it:"
    yield f"```\nvllm serve {repository}\n```"


def _made(facts: Facts) -> Iterator[str]:
    yield "## How it was made"
    rows = (f"| {name} | {_cell(value)} |" for name, value in choices(facts.quantization).items())
    yield "\n".join(["| | |", "|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
