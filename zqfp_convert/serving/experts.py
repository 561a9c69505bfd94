"""The experts of a mixture in vLLM: one after another, each as three packed linears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.platforms import current_platform

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.packed import PackedLayer, unpack
from zqfp_convert.errors import OptionError
from zqfp_convert.model.experts import DOWN, GATE, UP
from zqfp_convert.runtime import siblings
from zqfp_convert.runtime.linear import QuantizedLinear, Scratch
from zqfp_convert.serving import part
from zqfp_convert.serving.scheme import Scheme, incomplete

ACTIVATIONS: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: functional.silu,
    MoEActivation.GELU: functional.gelu,
    MoEActivation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
}
SCRATCH = Scratch()  # not that of linears: shared experts may run beside, on another stream
MATRICES = {"w1": GATE, "w3": UP, "w2": DOWN}  # as vLLM and we call them


class ZqfpExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Loads the packed matrices of a block's experts, and multiplies with them."""

    def __init__(self, scheme: Scheme, prefix: str, moe: FusedMoEConfig) -> None:
        """`prefix` is the name of the experts.

        Raises:
            OptionError: they do something that is not known here.
        """
        super().__init__(moe)
        self._scheme, self._prefix = scheme, prefix
        self._tensors: dict[tuple[int, str], dict[str, Tensor]] = {}  # of matrices not whole yet
        self._matrices: dict[tuple[int, str], PackedLayer] = {}  # by local expert
        graphs = get_current_vllm_config().compilation_config.cudagraph_mode
        if current_platform.is_cuda() and graphs != CUDAGraphMode.NONE:
            raise OptionError(
                prefix,
                "packed experts in CUDA graphs",
                needed="none: each expert multiplies as many tokens as the router gives it",
                do="Serve with --enforce-eager.",
            )
        if moe.activation not in ACTIVATIONS or moe.has_bias:
            biases = " and biases" if moe.has_bias else ""
            raise OptionError(
                prefix,
                f"experts with activation {moe.activation.value}{biases}",
                needed="gated experts without biases, and silu, gelu or gelu_tanh",
                do="Run the model with zqfp_convert.load, or serve the original.",
            )

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give each tensor of the format a place by the name that vLLM loads it into.

        Raises:
            OptionError: a group of weights would be cut in two, or some experts are not quantized.
        """
        if layer.apply_router_weight_on_input:
            raise OptionError(
                self._prefix,
                "experts whose inputs are multiplied by the router's weights",
                needed="outputs that are",
                do="Run the model with zqfp_convert.load, or serve the original.",
            )
        self._dtype, self._inner = params_dtype, intermediate_size_per_partition
        whole = self._inner * self.moe.moe_parallel_config.tp_size
        self._scheme.groups(f"{self._prefix} ({DOWN})", whole, self._inner)
        self._layer = [layer]  # in a list, so that it is no submodule of a submodule
        self._names = {
            "w1": layer.ckpt_gate_proj_name,
            "w2": layer.ckpt_down_proj_name,
            "w3": layer.ckpt_up_proj_name,
        }
        for number in range(layer.global_num_experts):
            for name in self._names.values():
                if (matrix := f"{self._prefix}.{number}.{name}") not in self._scheme.layers:
                    raise OptionError(
                        matrix,
                        "not quantized, and other experts are",
                        needed="all matrices of all experts, or none",
                        do="Convert again with --ignore for all of them or for none.",
                    )
        for suffix in layout.PACKED_SUFFIXES:
            for of in ("w13", "w2"):
                place = nn.Parameter(torch.empty(0), requires_grad=False)
                place.weight_loader = self._load  # type: ignore[attr-defined]
                layer.register_parameter(f"{of}_{suffix.removeprefix('.')}", place)

    def _load(
        self,
        param: Tensor,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Keep a tensor; what is this rank's of a matrix, once it is whole.

        Raises:
            CheckpointError: the matrix breaks a rule of the format.
        """
        local = self._layer[0]._map_global_expert_id_to_local_expert_id(expert_id)
        if local == -1:
            return False if return_success else None
        suffix = next(s for s in layout.PACKED_SUFFIXES if weight_name.endswith(s[1:]))
        name = f"{self._prefix}.{expert_id}.{self._names[shard_id]}"
        tensors = self._tensors.setdefault((local, shard_id), {})
        tensors[name + suffix] = loaded_weight.clone()  # who gives it may use its memory again
        if len(tensors) == self._count(name):
            columns = tensors[name + layout.PACKED].shape[1] * 2
            columns = min(columns, self._columns(shard_id))
            about = self._scheme
            layer = unpack(name, tensors, about.kind, about.group(columns), columns, about.books)
            layer.check()
            mine = self._of_rank(layer, shard_id)
            self._matrices[local, shard_id] = part.apart(mine, param.device)
            del self._tensors[local, shard_id]
        return True if return_success else None

    def _columns(self, shard_id: str) -> int:
        """K on disk."""
        ranks: int = self.moe.moe_parallel_config.tp_size
        width: int = self.moe.hidden_dim
        return self._inner * ranks if shard_id == "w2" else width

    def _count(self, name: str) -> int:
        """Tensors that a matrix has."""
        about, rank = self._scheme, self._scheme.layers[name].rank
        lorc = 0 if rank == 0 else 3 if about.factors == "e4m3" else 2
        return 2 + (about.kind == "m2") + (len(about.books) > 1) + lorc

    def _of_rank(self, layer: PackedLayer, shard_id: str) -> PackedLayer:
        first = self._inner * self.moe.moe_parallel_config.tp_rank
        take = part.of_columns if shard_id == "w2" else part.of_rows
        return take(layer, first, self._inner)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Arrange the weights for the kernels of the device they are on.

        Raises:
            CheckpointError: a matrix has not been loaded.
        """
        wanted = len(MATRICES) * layer.local_num_experts
        if len(self._matrices) < wanted:
            raise incomplete(self._prefix, " (matrices)", len(self._matrices), wanted)
        experts = nn.ModuleList()
        for local in range(layer.local_num_experts):
            expert = nn.Module()
            for shard_id, name in MATRICES.items():
                packed = self._matrices.pop((local, shard_id))
                expert.add_module(name, QuantizedLinear(packed, None, SCRATCH, self._dtype))
            siblings.link(expert)
            experts.append(expert)
        for name, _ in [*layer.named_parameters(recurse=False)]:
            if name.startswith(("w13_", "w2_")):
                delattr(layer, name)
        layer.quantized = experts
        shared = layer._expert_map
        ids = list(range(layer.local_num_experts)) if shared is None else shared.tolist()
        self._global = {place: number for number, place in enumerate(ids) if place >= 0}

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: no kernel of vLLM's runs."""

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: object,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The sum of the outputs of each token's experts times their weights, `[M, K]`."""
        activate = ACTIVATIONS[self.moe.activation]
        y = torch.zeros_like(x)
        for local, expert in enumerate(layer.quantized):
            token, place = (topk_ids == self._global[local]).nonzero(as_tuple=True)
            if len(token):
                seen = x[token]
                inner = activate(expert.get_submodule(GATE)(seen)) * expert.get_submodule(UP)(seen)
                out = expert.get_submodule(DOWN)(inner) * topk_weights[token, place, None]
                y.index_add_(0, token, out.to(y.dtype))
        return y
