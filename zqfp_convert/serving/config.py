"""What vLLM asks about a checkpoint: which of its layers are quantized, and how they are loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.models.utils import WeightsMapper

from zqfp_convert.checkpoint import layout
from zqfp_convert.errors import OptionError
from zqfp_convert.serving import scheme
from zqfp_convert.serving.experts import ZqfpExpertsMethod
from zqfp_convert.serving.linear import ADDED_BIAS, ZqfpLinearMethod

# What vLLM fuses in models that do not say it.
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
OLDEST = 75  # compute capability; the reference path runs everywhere, kernels from 8.9 on


class ZqfpConfig(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` of a checkpoint, and what its manifest says of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scheme: scheme.Scheme | None = None

    def get_name(self) -> str:
        """As in `config.json`."""
        return layout.FORMAT

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Of activations; float32 takes the reference path."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ten times the compute capability."""
        return OLDEST

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: it is in `config.json`."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ZqfpConfig:
        """An empty one; `maybe_update_config` reads the files, and holds them to the format."""
        return cls()

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the descriptions of the checkpoint: a folder, or a repository on the Hub.

        Raises:
            CheckpointError: they break a rule of the format.
            OptionError: vLLM's code for the model cannot load what they describe.
        """
        folder = Path(model_name)
        if not folder.is_dir():
            files = [layout.CONFIG_FILE, layout.MANIFEST_FILE]
            folder = Path(snapshot_download(model_name, revision=revision, allow_patterns=files))
        self.scheme = scheme.read(folder)
        if getattr(hf_config, "model_type", None) == "bloom" and self.scheme.factors is not None:
            raise OptionError(
                model_name,
                "BLOOM with low-rank factors",
                needed="none: vLLM rearranges their columns as if they were heads",
                do="Convert again with --rank 0.",
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Know the layers by the names that vLLM's model has for them."""
        assert self.scheme is not None
        self.scheme.rename(hf_to_vllm_mapper.apply_dict)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Biases that vLLM's model has no place for get one of ours."""
        assert self.scheme is not None
        added = [re.escape(name) for name, one in self.scheme.layers.items() if one.bias_added]
        if not added:
            return WeightsMapper()
        pattern = re.compile(f"^({'|'.join(added)})\\{layout.BIAS}$")
        return WeightsMapper(orig_to_new_regex={pattern: rf"\1.{ADDED_BIAS}"})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What multiplies a layer; None for layers that are never quantized.

        Raises:
            OptionError: it is quantized in a way that vLLM cannot run.
        """
        assert self.scheme is not None
        if isinstance(layer, RoutedExperts):
            if not any(name.startswith(f"{prefix}.") for name in self.scheme.layers):
                return None
            return ZqfpExpertsMethod(self.scheme, prefix, layer.moe_config)
        if not isinstance(layer, LinearBase):
            return None
        sources = self.scheme.sources(prefix, FUSED | self.packed_modules_mapping)
        if not sources:
            return UnquantizedLinearMethod()
        return ZqfpLinearMethod(self.scheme, prefix, sources)


def register_config() -> None:
    """Tell vLLM of it."""
    register_quantization_config(layout.FORMAT)(ZqfpConfig)
