"""Packed checkpoints in vLLM, which calls `register` by itself where this package is installed.

`vllm serve OUT/` then works. vLLM is imported here and nowhere else in the package.
"""

from __future__ import annotations


def register() -> None:
    """Make `quant_method: zqfp` known to vLLM (entry point `vllm.general_plugins`).

    vLLM calls it in each of its processes, maybe more than once.
    """
    from zqfp_convert.serving.config import register_config

    register_config()
