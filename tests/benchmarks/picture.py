"""Draws the README's picture: size and speed of a whole model, and closeness, against alternatives.

Nothing is measured here: the figures are read from tables of the README, which names the commands
that print them and the machines. A figure that is not found there is an error.

    python tests/benchmarks/picture.py
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
OURS, OTHER, ORIGINAL = "#0b6e6e", "#9aa5b1", "#4a5561"
FLOAT = r"[\d,]+(?:\.\d+)?"


def number(text: str) -> float:
    return float(text.replace(",", ""))


def found(path: Path, pattern: str) -> tuple[str, ...]:
    match = re.search(pattern, path.read_text(encoding="utf-8"))
    if match is None:
        raise SystemExit(f"{path.name} has nothing like {pattern}")
    return match.groups()


def kl(row: str) -> float:
    """Of the Llama, in a row of the README's table of other quantizers."""
    (cell,) = found(README, rf"\n\| {row} \| [\d.]+ \| (.*?) \|")
    return number(re.findall(r"\d+\.\d+", cell)[-1])  # of several, that with more iterations


def bars(
    axes: Axes, title: str, names: list[str], values: list[float], words: list[str], ours: int = 1
) -> None:
    for place, (name, value, told) in enumerate(zip(names, values, words, strict=True)):
        last = place >= len(values) - ours
        color = OURS if last else ORIGINAL if name == "bfloat16" else OTHER
        axes.barh(place, value, color=color, height=0.66)
        axes.text(value + max(values) * 0.02, place, told, va="center", fontsize=8.5)
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.4)
    axes.set_xticks([])
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def whole_model(axes: Sequence[Axes]) -> None:
    """An 8B model's size and speed, from the row of the H200."""
    pattern = (
        rf"\| H200 \| ({FLOAT}) against ({FLOAT}), ({FLOAT}) times \| ({FLOAT}) against ({FLOAT}), "
        rf"({FLOAT}) times \| ({FLOAT}) GB against ({FLOAT}) \|"
    )
    decode, bf16_decode, times, fill, bf16_fill, fill_times, size, bf16 = found(README, pattern)
    for one, title, pair, told in (
        (axes[0], "Weights of Llama-3.1-8B's shape, GB", (bf16, size), ""),
        (axes[1], "Decoding, H200, tokens/s", (bf16_decode, decode), f"  ({times} times)"),
        (
            axes[2],
            "Prefill of 8192 tokens, H200, tokens/s",
            (bf16_fill, fill),
            f"  ({fill_times} times)",
        ),
    ):
        words = [pair[0], pair[1] + told]
        bars(one, title, ["bfloat16", "ours"], [number(value) for value in pair], words)


def closeness(axes: Axes) -> None:
    """KL of the small Llama, ours beside other quantizers."""
    rows = {
        "llm-compressor, INT4": r"llm-compressor 0\.14\.0\.1, GPTQ, INT4, groups of 128",
        "llm-compressor, MXFP4": r"llm-compressor 0\.14\.0\.1, GPTQ, MXFP4",
        "AutoRound, MXFP4": r"AutoRound 0\.16\.1, MXFP4, .*? iterations",
        "AutoRound, INT4": r"AutoRound 0\.16\.1, INT4, groups of 128, .*? iterations",
        "ours, best": r"\*\*best, rank 0\*\*",
        "ours, max": r"\*\*max, rank 0\*\* .*?",
    }
    close = [kl(row) for row in rows.values()]
    bits = [found(README, rf"\n\| {row} \| ([\d.]+) \|")[0] for row in rows.values()]
    told = [f"{value:.4f} ({b} bits)" for value, b in zip(close, bits, strict=True)]
    bars(axes, "KL to the original, FP8 activations, Llama of 8.4 M", list(rows), close, told, 2)


def products(axes: Axes) -> None:
    """The kernels; ratios of geometric means over the same shapes are divided by each other."""
    bf16, fp8, humming = map(
        number, found(README, rf"\| 1, 16, 64 \| ({FLOAT}) \| ({FLOAT}) \| ({FLOAT}) \|")
    )
    times = [1.0, bf16 / fp8, bf16 / humming, bf16]
    names = ["bfloat16", "FP8, torch", "humming-kernels", "ours"]
    title = "Products, 1 to 64 tokens, H200, times bfloat16"
    bars(axes, title, names, times, [f"{value:.2f}" for value in times])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--to", type=Path, default=HERE / "plots" / "overview.svg")
    figure = Figure(figsize=(10.4, 4.4), facecolor="white", layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    whole_model(left.subplots(3, 1))
    above, below = right.subplots(2, 1, height_ratios=(6, 4))
    closeness(above)
    products(below)
    target = parser.parse_args().to
    rcParams["svg.hashsalt"] = "overview"  # the same file each time
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else {})


if __name__ == "__main__":
    main()
