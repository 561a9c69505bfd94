"""Spans of the matrices that programs fuse: what a kernel with a window of exponents can hold.

vLLM multiplies queries, keys and values in one product, and gate and up; its kernel for FP4
weights and FP8 activations on Hopper keeps a window of 12 exponents for the whole of it, and
quantizes groups below that again.
"""

from __future__ import annotations

from collections.abc import Mapping

from zqfp_convert.numerics.scales import MAX_SPAN
from zqfp_convert.runtime.siblings import SETS

Range = tuple[int, int]  # smallest and largest exponent


def wide(ranges: Mapping[str, Range]) -> dict[str, int]:
    """The fused sets whose span is above 11, by the names of their layers, and their spans.

    Args:
        ranges: of the exponents of each layer, by name.
    """
    sets: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in ranges:
        above, _, leaf = name.rpartition(".")
        fused = next((one for one in SETS if leaf in one), (leaf,))
        sets.setdefault((above, fused), []).append(name)
    found = {}
    for (above, _), layers in sets.items():
        span = max(ranges[n][1] for n in layers) - min(ranges[n][0] for n in layers)
        if span > MAX_SPAN:
            leaves = ", ".join(name.rpartition(".")[2] for name in sorted(layers))
            found[f"{above}: {leaves}"] = span
    return found
