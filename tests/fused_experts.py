"""Matrices and biases of experts put back into the tensors that a source has them all in.

How they lie there is not known: every way that fits the shape is tried, and what comes nearest to
the source's own tensor is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)\.(weight|bias)$")
PAIRS = (("gate_proj", "up_proj"), ("up_proj",), ("down_proj",))
Layout = tuple[tuple[str, ...], bool, bool]  # parts, interleaved, transposed


def layouts(parts: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, tuple[str, Layout]]:
    """For each tensor that holds experts, the module that has them, and how they lie.

    Args:
        parts: of one expert each, `....experts.7.gate_proj.weight`, about as in the source.
        before: the source's tensors.
    """
    owners = {found.group(1) for name in parts if (found := EXPERT.match(name))}
    result = {}
    for name, whole in before.items():
        owner = next((one for one in owners if name.startswith(one + ".")), None)
        if owner is None or name in parts:
            continue
        tried = {
            layout: float((made - whole).norm() / whole.norm())
            for layout in _possible(whole)
            if (made := joined(parts, owner, layout, whole)) is not None
        }
        if tried and min(tried.values()) < 0.5:
            result[name] = owner, min(tried, key=lambda layout: tried[layout])
    return result


def _possible(whole: Tensor) -> Iterator[Layout]:
    for pair in PAIRS:
        for interleaved in (False, True)[: len(pair)]:
            for transposed in (False, True)[: whole.ndim - 1]:
                yield pair, interleaved, transposed


def joined(parts: dict[str, Tensor], owner: str, layout: Layout, like: Tensor) -> Tensor | None:
    """The experts of a module in one tensor, `[experts, ...]`; None if they do not fit `like`."""
    pair, interleaved, transposed = layout
    leaf = "weight" if like.ndim == 3 else "bias"
    names = [
        [f"{owner}.experts.{expert}.{part}.{leaf}" for part in pair]
        for expert in range(like.shape[0])
    ]
    if not all(name in parts for one in names for name in one):
        return None
    each = []
    for one in names:
        rows = [parts[name] for name in one]
        if len({row.shape for row in rows}) > 1:
            return None
        whole = torch.stack(rows, 1).flatten(0, 1) if interleaved else torch.cat(rows)
        each.append(whole.T if transposed and like.ndim == 3 else whole)
    made = torch.stack(each)
    return made if made.shape == like.shape else None
