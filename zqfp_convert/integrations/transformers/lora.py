"""LoRA adapters of peft on packed layers.

peft wraps linears by their classes. A packed one gets peft's own layer for linears, which calls
what it wraps and adds to it; only that it cannot write into a packed weight.
"""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from peft.tuners import tuners_utils
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear
from torch import nn

from zqfp_convert.errors import OptionError

INITIAL = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the base weight alone


def register() -> None:
    """Put packed layers before the last of peft's kinds of layers, and among all linear ones."""
    dispatch = lora_model.dispatch_default
    include = tuners_utils._maybe_include_all_linear_layers

    def dispatch_packed(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
        if not _is_packed(target):
            found: nn.Module | None = dispatch(target, adapter_name, **kwargs)
            return found
        for unknown in ("parameter_name", "lora_config"):  # peft < 0.19 spells the latter out too
            kwargs.pop(unknown, None)
        with warnings.catch_warnings():  # peft asks linears of its own list alone for their shapes
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            return PackedLora(target, adapter_name, **kwargs)

    def include_packed(config: Any, model: nn.Module) -> Any:
        wanted = getattr(config, "target_modules", None)
        config = include(config, model)
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            config.target_modules |= _packed_names(model)
        return config

    lora_model.dispatch_default = dispatch_packed
    tuners_utils._maybe_include_all_linear_layers = include_packed


def _is_packed(module: nn.Module) -> bool:
    """Whether a module is a packed layer, or adapters around one."""
    from zqfp_convert.runtime.linear import QuantizedLinear

    base = module.get_base_layer() if isinstance(module, tuners_utils.BaseTunerLayer) else module
    return isinstance(base, QuantizedLinear)


def _packed_names(model: nn.Module) -> set[str]:
    """Packed layers that all linear ones include: those of experts they do not, as elsewhere."""
    from zqfp_convert.model.experts import mixtures

    inside = tuple(f"{path}." for path in mixtures(model))
    inside += tuple(
        f"{name}." for name, one in model.named_modules() if isinstance(one, PackedLora)
    )
    packed = {name for name, one in model.named_modules() if _is_packed(one)}
    return {name for name in packed if not name.startswith(inside)}


class PackedLora(Linear):  # type: ignore[misc]
    """LoRA adapters beside a packed layer, which stays as it is."""

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as peft does.

        Raises:
            OptionError: its initialization would write to the base weight.
        """
        config = kwargs.get("config")
        initial = (
            kwargs.get("init_lora_weights", True) if config is None else config.init_lora_weights
        )
        if initial not in INITIAL:
            raise OptionError(
                "init_lora_weights",
                repr(initial),
                needed="an initialization that leaves the base weight alone: True, 'gaussian', "
                "'orthogonal' or 'eva'",
                do="Use one of these: packed weights cannot be written to.",
            )
        super().update_layer(adapter_name, *args, **kwargs)

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
