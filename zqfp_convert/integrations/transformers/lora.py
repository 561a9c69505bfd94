"""LoRA adapters of peft on packed layers.

peft wraps linears by their classes. A packed one gets peft's own layer for linears, which calls
what it wraps and adds to it; only that it cannot write into a packed weight.
"""

from __future__ import annotations

from typing import Any, NoReturn

from peft.tuners.lora import model as peft_model
from peft.tuners.lora.layer import Linear
from torch import nn

from zqfp_convert.errors import OptionError

INITIAL = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the base weight alone


def register() -> None:
    """Put packed layers before the last of peft's kinds of layers."""
    default = peft_model.dispatch_default

    def dispatch_packed(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
        from zqfp_convert.runtime.linear import QuantizedLinear

        get_base = getattr(target, "get_base_layer", None)
        if isinstance(target if get_base is None else get_base(), QuantizedLinear):
            settings = kwargs.pop("lora_config", None)  # peft < 0.19 spells it out in the others
            _check(kwargs["config"] if settings is None else settings)
            kwargs.pop("parameter_name", None)
            return PackedLora(target, adapter_name, **kwargs)
        found: nn.Module | None = default(target, adapter_name, **kwargs)
        return found

    peft_model.dispatch_default = dispatch_packed


class PackedLora(Linear):  # type: ignore[misc]
    """A LoRA adapter beside a packed layer, which stays as it is."""

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: a sum of both is no packed weight.

        Raises:
            OptionError: always.
        """
        raise OptionError(
            "merging a LoRA adapter",
            "a packed layer under it",
            needed="plain weights",
            do="Load the base with quantization_config=zqfp_convert.ZqfpConfig(dequantize=True), "
            "and the adapter onto that.",
        )


def _check(config: Any) -> None:
    if config.init_lora_weights not in INITIAL:
        raise OptionError(
            "init_lora_weights",
            repr(config.init_lora_weights),
            needed="an initialization that leaves the base weight alone: True, 'gaussian', "
            "'orthogonal' or 'eva'",
            do="Use one of these: packed weights cannot be written to.",
        )
