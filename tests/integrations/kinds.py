"""Kinds of packed checkpoints that differ in what other programs have to mind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

# What is special in each: short last groups and compensation; tied embeddings and changed biases;
# transposed weights; norms on heads; a rotated residual stream with a head of its own; added
# biases; experts one by one and all in one tensor on disk; an expert's matrix left alone.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"recipe": "best"}),
    "opt": ("opt", {"recipe": "best"}),
    "gpt2": ("gpt2", {"recipe": "fast"}),
    "qwen3": ("qwen3", {"recipe": "fast"}),
    "gemma3": ("gemma3", {"recipe": "fast"}),
    "rotated": ("opt", {"recipe": "best", "rotation": "residual"}),
    "added": ("stablelm", {"recipe": "best"}),
    "mixtral": ("mixtral", {"recipe": "best"}),
    "gpt_oss": ("gpt_oss", {"recipe": "fast"}),
    "left": ("mixtral", {"recipe": "fast", "ignore": ("lm_head", "experts.1.w2")}),
}
Packed = Callable[[str], Path]
