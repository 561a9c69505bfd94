"""What was chosen for a checkpoint, and where its bits go, in words for people."""

from __future__ import annotations

from typing import Any

from zqfp_convert.report.facts import OTHERS, Facts
from zqfp_convert.report.wording import kinds

TOLD = (
    "name",
    "ignore",
    "scales",
    "group_size",
    "codebooks",
    "rank",
    "factors",
    "rotation",
    "tune",
    "samples",
    "seq_len",
)  # fields of a recipe that have lines of their own
SCALES = {
    "free": "any (free)",
    "m1": "powers of two (M1)",
    "m2": "a row scale times powers of two (M2)",
}
LEFT_ALONE = 12  # kinds of layers that are named at most


def spelled_bits(facts: Facts) -> str:
    """Where the bits of a weight go, in a sentence."""
    if not facts.weights:
        return ""
    held = {
        name: 8 * count / facts.weights
        for name, count in facts.sizes.items()
        if name != OTHERS and count
    }
    parts = ", ".join(f"{bits:.3f} of {name}" for name, bits in held.items())
    return f"A quantized weight has {facts.bits:.3f} bits: {parts}."


def choices(quantization: dict[str, Any]) -> dict[str, str]:
    """How a checkpoint was made, as far as it has that on record, for a table of two columns."""
    recipe, weights = quantization["recipe"], quantization["weights"]
    source = quantization["source"] or {}
    made = quantization["made_on"] or {}
    lorc = quantization["lorc"]
    rows: dict[str, str] = {}
    if source.get("name"):
        revision = f", revision {source['revision']}" if source.get("revision") else ""
        rows["made from"] = f"{source['name']}{revision}"
    rows["recipe"] = str(recipe.get("name", "unnamed"))
    rows["codes"] = "a pair of codebooks" if weights["format"] == "codebooks" else "E2M1"
    size = weights["group_size"]
    of = "one for each row" if size == "row" else f"for groups of {size}"
    rows["scales"] = f"{SCALES[weights['scales']]}, {of}"
    rows["activations"] = "E4M3 with a scale for each token, found as the model runs"
    rows["low-rank compensation"] = (
        f"rank {lorc['rank']}, factors in {lorc['factors']}" if lorc else "none"
    )
    if "rotation" in recipe:
        rows["rotation"] = str(recipe["rotation"])
    used = quantization["calibration"]
    rows["calibration"] = (
        f"{used['samples']} windows of {used['seq_len']} tokens, {used['source']}"
        if used
        else "none"
    )
    tuning = quantization["tuning"]
    if tuning:
        kept = "" if tuning["kept"] else ", not kept"
        rows["tuning"] = (
            f"{recipe.get('tune')} steps: KL on text held back {tuning['kl_before']:.4f} to "
            f"{tuning['kl_after']:.4f}{kept}"
        )
    rows["left alone"] = kinds(quantization["ignore"], LEFT_ALONE)
    rows["other choices"] = ", ".join(
        f"{name} {value}" for name, value in recipe.items() if name not in TOLD
    )
    producer = quantization["producer"]
    rows["made with"] = ", ".join(
        [f"{producer['name']} {producer['version']}"]
        + [f"{name} {made[name]}" for name in ("torch", "transformers") if name in made]
        + ([f"on {made['device']}"] if "device" in made else [])
    )
    return rows
