"""zqfp-convert: language models with 4-bit floating-point weights for FP8 tensor cores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zqfp_convert.integrations import arrival

if TYPE_CHECKING:
    from zqfp_convert.conversion import Conversion, convert
    from zqfp_convert.errors import ZqfpError
    from zqfp_convert.exporting import Export, export
    from zqfp_convert.integrations.transformers.config import ZqfpConfig
    from zqfp_convert.recipe import Recipe
    from zqfp_convert.runtime.loader import load

__version__ = "0.1.0"

__all__ = ["Conversion", "Export", "Recipe", "ZqfpConfig", "ZqfpError", "convert", "export", "load"]

_HOMES = {
    "Conversion": "zqfp_convert.conversion",
    "Export": "zqfp_convert.exporting",
    "Recipe": "zqfp_convert.recipe",
    "ZqfpConfig": "zqfp_convert.integrations.transformers.config",
    "ZqfpError": "zqfp_convert.errors",
    "convert": "zqfp_convert.conversion",
    "export": "zqfp_convert.exporting",
    "load": "zqfp_convert.runtime.loader",
}

# `from_pretrained` and peft know packed checkpoints from here on, in whatever order things come.
arrival.watch("transformers.quantizers.auto", "zqfp_convert.integrations.transformers.quantizer")
arrival.watch("peft.tuners.lora.model", "zqfp_convert.integrations.transformers.lora")


def __getattr__(name: str) -> Any:
    """Import on first use, so that loading a model does not pull in the converter."""
    if name in _HOMES:
        from importlib import import_module

        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
