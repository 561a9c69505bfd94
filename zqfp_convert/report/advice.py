"""What limited a checkpoint's quality, by its own figures, and what to try about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zqfp_convert.report.facts import Facts, Layer, middle

APART = 2.0  # times the median error: a layer that stands out
NAMED = 4  # layers that a sentence names at most
LONGER = 1.5  # times the KL of the best stretch: a context that suffers
SMALL_GROUP = 64
ENOUGH = 8  # tokens of calibration for each input of the widest layer


@dataclass(frozen=True)
class Finding:
    """One thing that was found: what it is, by which figures, and what to try (may be empty)."""

    title: str
    text: str
    attempt: str = ""


def findings(facts: Facts) -> list[Finding]:
    """What stands out, the weightiest first; each by figures that the checkpoint has on record."""
    return [
        *_evaluation(facts),
        *_calibration(facts),
        *_experts(facts),
        *_layers(facts),
        *_activations(facts),
        *_format(facts),
        *_contexts(facts),
        *_solver(facts),
        *_more(facts),
    ]


def _evaluation(facts: Facts) -> Iterator[Finding]:
    if facts.evaluation is None:
        yield Finding(
            "Not measured as a whole",
            "Errors of layers say where a model suffers, not how much: only a comparison of its "
            "token distributions with the original's does.",
            "zqfp-convert evaluate OUT/ --against MODEL --text TEXT.txt --json figures.json, then "
            "report OUT/ --evaluation figures.json",
        )
        return
    used = (facts.quantization["calibration"] or {}).get("source")
    for text in facts.evaluation["texts"]:
        if text["text"] == used:
            yield Finding(
                "Measured on the text that it was calibrated on",
                f"{used} is named as both, so the checkpoint looks closer here than it is.",
                "evaluate it on another --text",
            )


def _calibration(facts: Facts) -> Iterator[Finding]:
    used: dict[str, Any] | None = facts.quantization["calibration"]
    if not facts.calibrated:
        yield Finding(
            "Not calibrated",
            "Weights were rounded without knowing what they are multiplied with.",
            "--recipe best",
        )
        return
    if used is None:
        return
    tokens = used["samples"] * used["seq_len"]
    widest = max(facts.layers, key=lambda layer: layer.columns)
    if tokens < ENOUGH * widest.columns:
        yield Finding(
            "Too little calibration text",
            f"{tokens:,} tokens for layers of up to {widest.columns:,} inputs ({widest.name}), "
            f"{tokens / widest.columns:.1f} for each: with fewer than {ENOUGH} statistics are "
            "partly chance.",
            "more text, or --samples and --seq-len",
        )
    if used["source"] == "self-generated":
        yield Finding(
            "Calibrated on text that the model wrote",
            "That needs no data, but text like yours may suit your use better.",
            "--calibration with text of the kind that the model will see",
        )


def _experts(facts: Facts) -> Iterator[Finding]:
    if not facts.coverage:
        return
    pooled = sum(one.pooled for one in facts.coverage.values())
    matrices = sum(one.matrices for one in facts.coverage.values())
    fewest = min(one.fewest for one in facts.coverage.values())
    if pooled:
        yield Finding(
            "Experts that saw too few tokens",
            f"{pooled:,} of {matrices:,} matrices of experts saw fewer tokens than they have "
            f"columns (the fewest: {fewest:,}) and were solved with the statistics of their "
            "block's experts together.",
            "more calibration text (--samples), of more kinds",
        )


def _layers(facts: Facts) -> Iterator[Finding]:
    usual = middle([layer.error for layer in facts.layers])
    apart = [
        layer for layer in facts.worst(len(facts.layers)) if layer.error > APART * (usual or 0)
    ]
    if usual and apart:
        kind = "outputs" if facts.calibrated else "weights"
        yield Finding(
            "A few layers stand out",
            f"{len(apart):,} of {len(facts.layers):,} have more than {APART:g} times the median "
            f"error of {kind}, {usual:.1%}: {_named(apart)}.",
            "--rank auto, or leave the worst alone with --ignore",
        )


def _activations(facts: Facts) -> Iterator[Finding]:
    known = [layer for layer in facts.layers if layer.activation_error is not None]
    lost = [layer for layer in known if (layer.activation_error or 0) > layer.error]
    if not lost:
        return
    lost.sort(key=lambda layer: -(layer.activation_error or 0))
    rotation = facts.quantization["recipe"].get("rotation")
    yield Finding(
        "FP8 activations cost more than FP4 weights",
        f"In {len(lost):,} of {len(known):,} layers: {_named(lost, activations=True)}. Channels "
        "that are much larger than the others take the precision of the rest.",
        "--rotation residual, if it was not tried: auto keeps it only where a rehearsal gains by it"
        if rotation == "none" and not facts.coverage
        else "--ignore for the worst; closer weights would gain little there",
    )


def _format(facts: Facts) -> Iterator[Finding]:
    recipe, weights = facts.quantization["recipe"], facts.quantization["weights"]
    if weights["scales"] == "free":
        yield Finding(
            "Free scales run on the reference path only",
            "Their product with a code is no FP8 number.",
            "--scales m2",
        )
    elif weights["scales"] == "m1":
        yield Finding(
            "Scales are powers of two",
            "Row scales beside them (M2) cost 16 bits a row and were closer on every model "
            "measured so far.",
            "--scales m2",
        )
    if weights["format"] == "e2m1" and weights["scales"] != "free":
        yield Finding(
            "One codebook",
            "Where each group has the better of two, for one bit a group, models came closer.",
            "--codebooks pair",
        )
    raised = sum(layer.raised for layer in facts.layers)
    if raised:
        yield Finding(
            "Groups raised to keep the span",
            f"{raised:,} groups lay more than 11 powers of two below their row's largest and were "
            "encoded more coarsely. Their weights are that small too.",
        )
    if recipe.get("rotation") == "none" and recipe.get("name") == "paper":
        yield Finding("A baseline", "This is ZeroQuant-FP as printed.", "--recipe best")


def _contexts(facts: Facts) -> Iterator[Finding]:
    used = facts.quantization["calibration"] or {}
    for text in (facts.evaluation or {}).get("texts", ()):
        places = [place for place in text["positions"] if place["tokens"] >= 256]
        if len(places) < 2:
            continue
        best = min(places, key=lambda place: place["kl"]["mean"])
        last = places[-1]
        if last["kl"]["mean"] > LONGER * best["kl"]["mean"]:
            shorter = used.get("seq_len", 0) < last["last"]
            yield Finding(
                "Long contexts suffer",
                f"On {text['text']} the KL is {last['kl']['mean']:.4f} after {last['first']:,} "
                f"tokens and more, {best['kl']['mean']:.4f} after {best['first']:,}.",
                "a longer --seq-len" if shorter else "calibration text with longer documents",
            )


def _solver(facts: Facts) -> Iterator[Finding]:
    retried = [layer for layer in facts.layers if layer.damping_retries]
    if retried:
        yield Finding(
            "Statistics that could not be factorized at once",
            f"{len(retried):,} layers needed more damping: {_named(retried)}.",
            "more calibration text",
        )
    tuning = facts.quantization["tuning"]
    if tuning is not None and not tuning["kept"]:
        yield Finding(
            "Tuning did not help",
            f"On text held back the KL went from {tuning['kl_before']:.4f} to "
            f"{tuning['kl_after']:.4f}, so the checkpoint is as it was before.",
            "more text to tune on (--tune-samples)",
        )


def _more(facts: Facts) -> Iterator[Finding]:
    recipe, size = facts.quantization["recipe"], facts.quantization["weights"]["group_size"]
    if facts.calibrated and (size == "row" or size > SMALL_GROUP):
        now = 0.0 if size == "row" else 1 / size
        per_group = 9 if facts.quantization["weights"]["format"] == "codebooks" else 8
        yield Finding(
            "More bits would bring it closer",
            f"Smaller groups gain the most for their bits: groups of {SMALL_GROUP} cost "
            f"{per_group * (1 / SMALL_GROUP - now):.2f} bits a weight more, groups of 32 "
            f"{per_group * (1 / 32 - now):.2f}.",
            f"--group-size {SMALL_GROUP}, or 32",
        )
    if facts.calibrated and not recipe.get("tune") and recipe.get("name") != "paper":
        yield Finding(
            "Tuning would bring it closer at the same bits",
            "All layers together can be tuned on the original's token distributions, for time.",
            "--recipe max",
        )


def _named(layers: list[Layer], *, activations: bool = False) -> str:
    def shown(layer: Layer) -> str:
        error = layer.activation_error if activations else layer.error
        return f"{layer.name} ({error:.1%})"

    more = f" and {len(layers) - NAMED:,} more" if len(layers) > NAMED else ""
    return ", ".join(shown(layer) for layer in layers[:NAMED]) + more
