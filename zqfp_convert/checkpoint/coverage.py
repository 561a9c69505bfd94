"""How well calibration covered the experts of a checkpoint, by what its manifest says of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Coverage:
    """Of the experts of one block.

    Attributes:
        experts: how many there are.
        fewest, most: tokens that an expert was calibrated on.
        matrices: quantized ones.
        pooled: those of them that were solved with the moments of all experts' tokens.
    """

    experts: int
    fewest: int
    most: int
    matrices: int
    pooled: int


def coverage(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Coverage]:
    """By the experts' names on disk, from the manifest's layers; empty without calibration."""
    of: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for name, entry in layers.items():
        if "tokens" in entry:
            experts, number = name.rsplit(".", 2)[:2]
            of.setdefault(experts, {}).setdefault(number, []).append(entry)
    found = {}
    for experts, each in of.items():
        entries = [entry for matrices in each.values() for entry in matrices]
        tokens = [entry["tokens"] for entry in entries]
        pooled = sum(bool(entry.get("pooled")) for entry in entries)
        found[experts] = Coverage(len(each), min(tokens), max(tokens), len(entries), pooled)
    return found
