"""What `from_pretrained` and `save_pretrained` call for packed checkpoints.

transformers is still being imported when this module is; so what needs the whole of it is imported
in the methods.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from zqfp_convert.checkpoint import layout
from zqfp_convert.errors import OptionError
from zqfp_convert.integrations.transformers.config import ZqfpConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from zqfp_convert.integrations.transformers.packing import Packing


def register() -> None:
    """Make `quant_method: zqfp` known to transformers."""
    if layout.FORMAT not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(layout.FORMAT)(ZqfpConfig)
        auto.register_quantizer(layout.FORMAT)(ZqfpQuantizer)


class ZqfpQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed layers into a model before its weights are loaded, and fills them after."""

    _packing: Packing

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse what cannot be loaded.

        Raises:
            OptionError: the model is not packed, or part of it would lie outside of the GPUs.
        """
        if not self.pre_quantized:
            raise OptionError(
                "quantization_config",
                "ZqfpConfig for a model that is not packed",
                needed="a checkpoint made by zqfp-convert",
                do="Make one first: zqfp-convert MODEL OUT/.",
            )
        places = set(map(str, device_map.values())) if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise OptionError(
                "device_map",
                f"parts of the model on {' and '.join(sorted(places))}",
                needed="all of it on GPUs, or on the CPU: packed layers are not offloaded",
                do="Use GPUs with more memory in all, or device_map='cpu'.",
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from zqfp_convert.integrations.transformers.packing import Packing

        if not checkpoint_files:
            raise OptionError(
                "state_dict",
                "weights that are given instead of read",
                needed="the files of a packed checkpoint",
                do="Leave state_dict away, and give the checkpoint's folder.",
            )
        with torch.device("cpu"):  # for small proofs by numbers; the context around is meta
            self._packing = Packing(model, Path(checkpoint_files[0]).parent)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        from zqfp_convert.integrations.transformers.saving import Saver

        self._packing.fill(model)
        if self.quantization_config.dequantize:
            self._packing.dequantize(model)
        else:
            model.save_pretrained = Saver(model)

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        # A configuration that was saved has it as a string.
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self._packing.dequantize(model, wanted)
        del model.save_pretrained
        return model

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes that an element takes in the end, for `device_map="auto"`."""
        if self.quantization_config.dequantize and param_name.endswith(layout.PACKED):
            return float(2 * model.dtype.itemsize)  # two weights a byte
        return param.element_size()

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors to save by their names on disk; None where adapters are saved instead."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        return self._packing.tensors(model), {}

    @property
    def manifest(self) -> dict[str, Any]:
        """That of the checkpoint."""
        return self._packing.manifest

    def is_serializable(self, **_: Any) -> bool:
        """Packed layers are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on packed layers are; the layers themselves stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether one graph has the whole model; experts are chosen outside of graphs."""
        return not self._packing.fused
