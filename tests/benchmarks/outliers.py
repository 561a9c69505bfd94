"""Makes a version of a model that computes the same function, but has outlier channels.

In each block, a few channels of the norms before the linears get gains many times as large, and
the columns of the linears that read them are divided by as much. Large language models have such
channels by themselves; small ones do not. Llama and OPT (and what is built like them).

    python tests/benchmarks/outliers.py MODEL OUT
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

READERS = {  # of a norm's output, by the names in a block
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "final_layer_norm": ("fc1",),
}


def blow_up(model: torch.nn.Module, channels: int, factor: float, seed: int) -> int:
    """Give the model outlier channels in place; returns how many norms have them."""
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    changed = 0
    for name, norm in modules.items():
        path, _, leaf = name.rpartition(".")
        if f"{path}.{READERS.get(leaf, ('',))[0]}" not in modules:
            continue
        chosen = torch.randperm(len(norm.weight), generator=generator)[:channels]
        norm.weight.data[chosen] *= factor
        if getattr(norm, "bias", None) is not None:
            norm.bias.data[chosen] *= factor
        for reader in READERS[leaf]:
            modules[f"{path}.{reader}"].weight.data[:, chosen] /= factor
        changed += 1
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--factor", type=float, default=32.0, help="a power of two is exact")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model)
    changed = blow_up(model, given.channels, given.factor, given.seed)
    shutil.copytree(
        given.model, given.out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json")
    )
    tied = {name for name in model.all_tied_weights_keys if model.config.tie_word_embeddings}
    tensors = {name: t.contiguous() for name, t in model.state_dict().items() if name not in tied}
    save_file(tensors, given.out / "model.safetensors", {"format": "pt"})
    print(f"{given.channels} channels of {changed} norms times {given.factor:g}: {given.out}")


if __name__ == "__main__":
    main()
