"""Tiny random mixtures of experts of every architecture that their conversion is proved on.

`reference` is what a packed one has to compute: transformers' own model, its experts fused as it
fuses them, with dequantized weights and quantized activations. It shares no code with the package.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from architectures import write_tokenizer
from dequantized import lorc_of, manifest, quantization_config, read_tensors, seen, weight_of
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

WIDTH, INNER, EXPERTS, VOCABULARY = 32, 48, 4, 384
QUICK: dict[str, Any] = {
    "device": "cpu",
    "samples": 12,
    "seq_len": 32,
    "group_size": 32,
    "low_rank_rounds": 1,
    "tune_samples": 0,
}
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPARSE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
DENSE_FIRST = {**SPARSE, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
               "first_k_dense_replace": 1}  # fmt: skip
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
          "v_head_dim": 8, "num_key_value_heads": 4}  # fmt: skip
ONE = {"num_hidden_layers": 1}
SHARED = {"shared_expert_intermediate_size": 16, "num_experts": EXPERTS}

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": EXPERTS}),
    "qwen2_moe": ("Qwen2MoeConfig", {**ONE, **SPARSE, **SHARED}),
    "qwen3_moe": ("Qwen3MoeConfig", {**SPARSE, "num_experts": EXPERTS, "head_dim": 8}),
    "qwen3_next": ("Qwen3NextConfig", {
        **SPARSE, **SHARED, "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"]}),
    "olmoe": ("OlmoeConfig", {**ONE, "num_experts": EXPERTS, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2Config", {**DENSE_FIRST, **LATENT, "n_group": 1, "topk_group": 1}),
    "deepseek_v3": ("DeepseekV3Config", {**DENSE_FIRST, **LATENT, "n_group": 2, "topk_group": 1}),
    "gpt_oss": ("GptOssConfig", {
        "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "llama4": ("Llama4TextConfig", {
        "intermediate_size_mlp": 40, "num_local_experts": EXPERTS, "head_dim": 8,
        "interleave_moe_layer_step": 2}),
    "glm4_moe": ("Glm4MoeConfig", {
        **DENSE_FIRST, "head_dim": 8, "n_group": 1, "topk_group": 1}),
    "granitemoe": ("GraniteMoeConfig", {
        **ONE, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "phimoe": ("PhimoeConfig", {**ONE, "num_local_experts": EXPERTS}),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", {
        "moe_num_experts": EXPERTS, "moe_k": 2, "moe_intermediate_size": 16,
        "moe_layer_start_index": 1, "moe_num_shared_experts": 1}),
    "dots1": ("Dots1Config", {**DENSE_FIRST, "n_group": 1, "topk_group": 1}),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {
        **ONE, "num_experts": EXPERTS, "moe_topk": [2], "head_dim": 8}),
    "minimax_m2": ("MiniMaxM2Config", {
        **ONE, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 8}),
    "lfm2_moe": ("Lfm2MoeConfig", {
        **SPARSE, "num_experts": EXPERTS, "num_dense_layers": 1,
        "layer_types": ["full_attention", "conv"]}),
    "afmoe": ("AfmoeConfig", {
        **SPARSE, "num_experts": EXPERTS, "num_dense_layers": 1, "num_shared_experts": 1,
        "head_dim": 8}),
}  # fmt: skip
FUSED_ON_DISK = ("gpt_oss", "llama4", "granitemoe")
# Experts that older transformers keep otherwise.
SINCE = {"granitemoe": "GraniteMoeExperts", "afmoe": "AfmoeExperts"}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.(weight|bias)$")


def architectures() -> list[str]:
    """Those that the installed transformers keeps in a way that is known."""

    def fuses(arch: str) -> bool:
        modeling = import_module(f"transformers.models.{arch}.modeling_{arch}")
        return hasattr(getattr(modeling, SINCE[arch], None), "_apply_gate")

    return [arch for arch in MIXTURES if arch not in SINCE or fuses(arch)]


def configuration(arch: str, **changes: Any) -> hf.PretrainedConfig:
    """The tiny configuration of an architecture."""
    kind, settings = MIXTURES[arch]
    return getattr(hf, kind)(**{**BASE, **settings, **changes})


def random_mixture(
    arch: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> hf.PreTrainedModel:
    """A model with random weights, norms and biases, whose activations stay of one size."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(configuration(arch, **changes), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        else:
            parameter.data = torch.randn_like(parameter) * (2.0 / parameter.shape[-1]) ** 0.5
    return model.to(dtype).eval()


def write_mixture(
    folder: Path,
    arch: str,
    dtype: torch.dtype = torch.float32,
    change: Callable[[hf.PreTrainedModel], None] | None = None,
    **changes: Any,
) -> Path:
    """Save a tiny random mixture with a tokenizer; returns the folder."""
    model = random_mixture(arch, dtype, **changes)
    if change is not None:
        change(model)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def original(folder: Path) -> hf.PreTrainedModel:
    """The model as transformers loads it, its experts run by its own lines."""
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    return loaded.eval()


def reference(source: Path, packed: Path, scratch: Path) -> Callable[[Tensor], Tensor]:
    """The logits `[batch, tokens, vocabulary]` of token ids that a packed mixture has to give."""
    tensors, before = read_tensors(packed), read_tensors(source)
    layers = {
        name: dense_weight(packed, tensors, name, entry["shape"][1])
        for name, entry in manifest(packed)["layers"].items()
    }
    weights = {name: tensors.get(name, value) for name, value in before.items()}
    weights |= {f"{n}.weight": w for n, w in layers.items() if f"{n}.weight" in before}
    if not all(f"{name}.weight" in before for name in layers):
        weights |= fused({f"{n}.weight": w for n, w in layers.items()} | tensors, before)
    scratch.mkdir()
    (scratch / "config.json").write_bytes((source / "config.json").read_bytes())
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, scratch / "model.safetensors", metadata={"format": "pt"})
    model = original(scratch)
    for name, kind in manifest(packed)["changed"].items():
        if kind == "bias_added":
            bias = nn.Parameter(tensors[name], requires_grad=False)
            model.get_submodule(name.removesuffix(".bias")).bias = bias
    plain = [n for n in layers if not EXPERT.match(f"{n}.weight")]
    quantized = [model.get_submodule(name).weight for name in plain]
    quantized += [p for p in model.parameters() if p.ndim == 3 and p.shape[0] == EXPERTS]

    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad(), QuantizedInputs(quantized):
            return model(ids).logits

    return logits


def dense_weight(folder: Path, tensors: dict[str, Tensor], name: str, columns: int) -> Tensor:
    """A packed layer's weight with its low-rank compensation, float32 `[N, K]`."""
    config = quantization_config(folder)["weights"]
    size = config["group_size"]
    books = config.get("codebooks")
    args = (tensors, name, columns, columns if size == "row" else size)
    weight = weight_of(*args) if books is None else weight_of(*args, books)
    factors = lorc_of(tensors, name)
    return (weight if factors is None else weight + factors[1] @ factors[0]).float()


def fused(parts: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and biases of experts as gpt-oss, Llama 4 and GraniteMoE store them."""
    result: dict[str, Tensor] = {}
    for name, whole in before.items():
        path, _, leaf = name.rpartition(".")
        granite = re.match(r"(.*)\.(input|output)_linear$", path)
        if granite is not None:
            kind, above = granite.group(2), f"{granite.group(1)}.experts"
            pair = ("gate_proj", "up_proj") if kind == "input" else ("down_proj",)
            result[name] = torch.stack([
                torch.cat([parts[f"{above}.{e}.{part}.weight"] for part in pair])
                for e in range(EXPERTS)
            ])  # fmt: skip
        elif leaf.startswith(("gate_up_proj", "down_proj")) and path.endswith(".experts"):
            end = "bias" if leaf.endswith("_bias") else "weight"
            pair = ("gate_proj", "up_proj") if leaf.startswith("gate") else ("down_proj",)
            each = []
            for e in range(EXPERTS):
                rows = [parts[f"{path}.{e}.{part}.{end}"] for part in pair]
                if len(pair) > 1 and ".mlp." in path:  # gpt-oss: gate and up rows take turns
                    joined = torch.stack(rows, 1).flatten(0, 1)
                else:
                    joined = torch.cat(rows)
                each.append(joined.T if end == "weight" else joined)
            result[name] = torch.stack(each)
        if name in result:
            assert result[name].shape == whole.shape
    return result


class QuantizedInputs(TorchFunctionMode):
    """While it is open, whatever is multiplied with these weights is quantized to E4M3 first."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        super().__init__()
        self._storages = {weight.untyped_storage().data_ptr() for weight in weights}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        products = (nn.functional.linear, torch.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)
        if function in products:
            x, weight, *rest = args
            if weight.untyped_storage().data_ptr() in self._storages:
                args = (seen(x), weight, *rest)
        if function is torch.addmm:
            bias, x, weight = args
            if weight.untyped_storage().data_ptr() in self._storages:
                args = (bias, seen(x), weight)
        return function(*args, **(kwargs or {}))
