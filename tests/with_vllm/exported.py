"""Exported models in a real vLLM engine on the CPU.

A model is converted with low-rank compensation and exported to compressed-tensors and to bfloat16,
and vLLM loads both, the compensation as a LoRA adapter or merged. Of
compressed-tensors every layer has to get vLLM's scheme of MXFP4 weights and FP8 activations, and
none that was left alone. vLLM brings no kernel of that scheme for the CPU, so one in plain torch is
registered here, which decodes the bytes that vLLM has loaded and fused. The log-probabilities of a
text are compared with those of transformers' own model: with layers that the tests have decoded
(and an adapter that, as in vLLM, sees activations before they are quantized), and for bfloat16 with
the same files.

`make test-vllm` runs it; by hand: python tests/with_vllm/exported.py
"""

from __future__ import annotations

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, to look at its model
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

import gc
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import vllm
from dequantized import CODES, Dense, dense, manifest, read_tensors, seen
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear.mxfp4.base import MxFp4LinearKernel
from vllm.platforms import PlatformEnum

import zqfp_convert

DEMO = Path(zqfp_convert.__file__).parent / "demo" / "model"
TOKENS = 200
SCHEME = "CompressedTensorsW4A8Mxfp4"
DIFFERENCE = {"compressed-tensors": 0.001, "bf16": 0.001}  # mean, of log-probabilities


class ReferenceKernel(MxFp4LinearKernel):
    """MXFP4 weights and FP8 activations with a scale for each token, in float32."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: object) -> tuple[bool, str | None]:
        key = config.activation_quant_key
        fp8 = key is not None and key.dtype == torch.float8_e4m3fn
        return fp8, "only FP8 activations"

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        packed = layer.weight.data.long()
        codes = torch.stack((packed % 16, packed // 16), 2).flatten(1)
        scale = 2.0 ** (layer.weight_scale.data.double() - 127)
        dense = CODES[codes] * scale.repeat_interleave(32, 1)
        layer.weight = nn.Parameter(dense.float(), requires_grad=False)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = seen(x) @ layer.weight.T
        return (y if bias is None else y + bias.float()).to(x.dtype)


def schemes(model: nn.Module) -> Counter[str]:
    """How many modules have which quantization, by kind of module."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            kind = getattr(module, "scheme", None) or method
            found[name.removesuffix(".base_layer")] = type(kind).__name__  # under a LoRA
    return Counter(f"{name.rpartition('.')[2]}: {kind}" for name, kind in found.items())


def log_probabilities(made: zqfp_convert.Export, ids: list[int]) -> tuple[Tensor, Counter[str]]:
    """Of each token but the first, after those before it; and what vLLM made of the layers."""
    adapter = None if made.adapter is None else LoRARequest("lorc", 1, str(made.adapter))
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    engine = vllm.LLM(str(made.dest), enable_lora=adapter is not None, **options)
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    prompt = [{"prompt_token_ids": ids}]
    output = engine.generate(prompt, sampling, use_tqdm=False, lora_request=adapter)[0]
    places = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    found = torch.tensor([each[token].logprob for token, each in places])
    counted = engine.apply_model(schemes)[0]
    del engine
    gc.collect()
    return found, counted


class Adapted(Dense):
    """A layer whose compensation sees activations as they are."""

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.lorc
        return seen(x) @ self.weight.T + (x @ A.T) @ B.T


def decoded(packed: Path) -> nn.Module:
    """transformers' model of the demonstration model, with layers that the tests have decoded."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tensors = read_tensors(packed)
    for name in manifest(packed)["layers"]:
        layer = dense(packed, tensors, name, torch.float32)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, Adapted(layer.weight, layer.lorc, layer.bias))
    return model


def wanted(model: nn.Module, ids: list[int]) -> Tensor:
    """The same by a model of transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
    every = logits[:-1].log_softmax(-1)
    return every.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def main() -> None:
    """Compare, print, and end with an error where something differs."""
    kernels._POSSIBLE_MXFP4_KERNELS[PlatformEnum.CPU] = [ReferenceKernel]
    blocks = 4
    fused = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        options = {"recipe": "fast", "scales": "m1", "group_size": 64, "rank": 8, "device": "cpu"}
        zqfp_convert.convert(DEMO, folder / "packed", **options)
        packed = zqfp_convert.load(folder / "packed", device="cpu")
        start = torch.tensor([[0]])
        ids = packed.generate(start, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        ids = ids[0].tolist()
        for to, allowed in DIFFERENCE.items():
            made = zqfp_convert.export(folder / "packed", folder / to, to)
            have, counted = log_probabilities(made, ids)
            if to == "compressed-tensors":
                want = wanted(decoded(folder / "packed"), ids)
                assert {f"{name}: {SCHEME}": blocks for name in fused}.items() <= counted.items()
                assert sum(n for name, n in counted.items() if SCHEME in name) == 4 * blocks
            else:
                want = wanted(
                    AutoModelForCausalLM.from_pretrained(made.dest, dtype=torch.float32), ids
                )
            difference = float((have - want).abs().mean())
            print(f"{to}: {dict(counted)}; mean difference {difference:.5f} nats", flush=True)
            assert difference <= allowed, (to, difference)


if __name__ == "__main__":
    main()
