"""What llama.cpp has to be told of a model, for the architectures whose arithmetic it shares.

The keys are those of `gguf.constants.Keys`; what they mean to llama.cpp is in its model loader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from zqfp_convert.errors import SourceError

QKV = ("attn_q", "attn_k", "attn_v")
INNER = ("ffn_gate", "ffn_up", "ffn_down")
OTHERWISE = "Export --to bf16, and convert that with llama.cpp's own script."


@dataclass(frozen=True)
class Family:
    """An architecture of llama.cpp.

    Attributes:
        arch: its name in GGUF.
        interleaved: whether the two numbers that a rotary embedding turns lie side by side there,
            and not half a head apart, as in transformers.
        biases: tensors that may have one.
        normalizes: of a mixture: whether the weights of the chosen experts sum to 1 there.
    """

    arch: str
    interleaved: bool
    biases: tuple[str, ...] = ()
    normalizes: bool = True


LLAMA = Family("llama", True, (*QKV, "attn_output", *INNER))
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Family("qwen2", False, QKV),
    "qwen3": Family("qwen3", False),
    "mixtral": Family("llama", True),
    "qwen2_moe": Family("qwen2moe", False, QKV, normalizes=False),
    "qwen3_moe": Family("qwen3moe", False),
}


class Architecture:
    """The architecture of one model.

    Attributes:
        family: as llama.cpp knows it.
        config: of the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Look at a model, which may be on the meta device.

        Raises:
            SourceError: llama.cpp would compute something else, or this is not known.
        """
        self.config: PretrainedConfig = model.config
        kind = self.config.model_type
        if kind not in FAMILIES:
            raise _refused(f"model_type {kind!r}", "one of " + ", ".join(FAMILIES))
        self.family = FAMILIES[kind]
        self.heads: int = self.config.num_attention_heads
        self.kv_heads: int = self.config.num_key_value_heads
        self.head: int = (
            getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads
        )
        self._check()
        archs = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        self._names = gguf.get_tensor_name_map(
            archs[self.family.arch], self.config.num_hidden_layers
        )

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary embedding's settings."""
        found: dict[str, Any] = self.config.rope_parameters
        return found

    def name(self, place: str) -> str:
        """The name in GGUF of a tensor, by its name in the model.

        Raises:
            SourceError: llama.cpp has none.
        """
        module, _, leaf = place.rpartition(".")
        found: str | None = self._names.get_name(module)
        known = leaf == "weight" or (
            leaf == "bias" and found is not None and found.rpartition(".")[2] in self.family.biases
        )
        if found is None or not known:
            raise _refused(f"a tensor {place!r}", "tensors that llama.cpp has for it")
        return f"{found}.{leaf}"

    def rows(self, name: str) -> Tensor | None:
        """The order in which llama.cpp has the rows of a tensor, int64 `[N]`; None for ours.

        In each head of queries and keys row `t d/2 + j` becomes row `2 j + t`.
        """
        heads = {"attn_q": self.heads, "attn_k": self.kv_heads}.get(name.split(".")[-2])
        if heads is None or not self.family.interleaved:
            return None
        order = torch.arange(heads * self.head).view(heads, 2, self.head // 2)
        return order.transpose(1, 2).reshape(-1)

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Write the hyperparameters."""
        config = self.config
        window = getattr(config, "sliding_window", None)
        context = config.max_position_embeddings
        writer.add_vocab_size(config.vocab_size)
        # It attends to everything: the same for as many tokens as the window holds.
        writer.add_context_length(min(context, window or context))
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head)
        writer.add_value_length(self.head)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head)
        writer.add_rope_freq_base(self.rope["rope_theta"])
        self._describe_experts(writer)
        if self.rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self.rope["factor"])

    def _describe_experts(self, writer: gguf.GGUFWriter) -> None:
        config = self.config
        count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        if count is None:
            return
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if hasattr(config, "moe_intermediate_size"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if hasattr(config, "shared_expert_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)

    def frequencies(self) -> Tensor | None:
        """What the rotary frequencies are divided by, float32 `[head / 2]`; None for nothing."""
        if self.rope["rope_type"] != "llama3":
            return None
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        steps = torch.arange(0, self.head, 2, dtype=torch.float32) / self.head
        factors: Tensor = (self.rope["rope_theta"] ** -steps) / scaled
        return factors

    def _check(self) -> None:
        config = self.config
        if config.hidden_act != "silu":
            raise _refused(f"hidden_act {config.hidden_act!r}", "silu")
        if config.num_attention_heads % config.num_key_value_heads or self.head % 2:
            raise _refused("heads that cannot be shared", "whole groups of heads of even size")
        if getattr(config, "norm_topk_prob", self.family.normalizes) != self.family.normalizes:
            raise _refused(
                f"norm_topk_prob {config.norm_topk_prob}", str(self.family.normalizes).lower()
            )
        if (
            getattr(config, "mlp_only_layers", None)
            or getattr(config, "decoder_sparse_step", 1) > 1
        ):
            raise _refused("blocks without experts among those with", "experts in every block")
        rope = self.rope
        kinds = ("default", "linear", *(("llama3",) if self.family.arch == "llama" else ()))
        if rope.get("rope_type", "default") not in kinds:
            raise _refused(f"rotary embeddings {rope['rope_type']!r}", "one of " + ", ".join(kinds))
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise _refused("partial rotary embeddings", "whole heads that are turned")


def _refused(found: str, needed: str) -> SourceError:
    return SourceError("export to gguf", found, needed=needed, do=OTHERWISE)
