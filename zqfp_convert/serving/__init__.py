"""Packed checkpoints in vLLM, which calls `register` by itself where this package is installed.

`vllm serve OUT/` then works. vLLM is imported here and nowhere else in the package.
"""

from __future__ import annotations

import warnings


def register() -> None:
    """Make `quant_method: zqfp` known to vLLM (entry point `vllm.general_plugins`).

    vLLM calls it in each of its processes, maybe more than once. One that has not what is needed
    here is left alone, with a warning: it serves other models still.
    """
    try:
        from zqfp_convert.serving.config import register_config
    except ImportError as error:
        warnings.warn(
            f"zqfp checkpoints cannot be served: this vLLM is not as 0.32 is ({error}). Install "
            "vllm==0.32.0, or a zqfp-convert that knows this one",
            stacklevel=2,
        )
    else:
        register_config()
