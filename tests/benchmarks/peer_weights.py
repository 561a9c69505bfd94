"""Weights as AutoRound or llm-compressor quantize them, in a plain folder for accuracy.py --peers.

    python tests/benchmarks/peer_weights.py METHOD MODEL OUT --calibration C.txt

Runs where the program that METHOD names is installed beside this package; the two exclude each
other: `pip install . auto-round==0.16.1` or `pip install . llmcompressor==0.14.0.1`.

Method: the program gets MODEL in float32 and the calibration windows that zqfp-convert takes for
the same options, on the CPU; what no option here sets is its default. It quantizes the linear
layers of the decoder's blocks, symmetrically. OUT is MODEL with these weights, dequantized, in
float32; scales of integers count 16 bits and are rounded to float16. In OUT/peer.json: bits a
weight, seconds, the share of weights that are not what rounding to the same values would give, and
what was asked for.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from zqfp_convert.calibration.text import Text, windows
from zqfp_convert.model.blocks import find_blocks, linears
from zqfp_convert.model.tokenizer import tokenizer_of

METHODS = {  # what quantizes, to what
    "autoround-int4": ("auto-round", "int4"),
    "autoround-mxfp4": ("auto-round", "mxfp4"),
    "llmcompressor-gptq-int4": ("llmcompressor", "int4"),
    "llmcompressor-gptq-mxfp4": ("llmcompressor", "mxfp4"),
}
GROUP = {"int4": 128, "mxfp4": 32}
BITS = {"int4": 4 + 16 / 128, "mxfp4": 4 + 8 / 32}  # a weight, scales included
LEVELS = 2**4
AUTOROUND: dict[str, dict[str, Any]] = {  # parts of its schemes
    "int4": {"bits": 4, "sym": True, "data_type": "int", "group_size": GROUP["int4"]},
    "mxfp4": {"bits": 4, "sym": True, "data_type": "mx_fp", "group_size": GROUP["mxfp4"]},
    "fp8": {
        "act_bits": 8,
        "act_data_type": "fp",
        "act_group_size": -1,
        "act_sym": True,
        "act_dynamic": True,
    },
    "none": {"act_bits": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iters", type=int, default=200, help="AutoRound's steps for each block")
    parser.add_argument(
        "--activations",
        choices=["none", "fp8"],
        default="none",
        help="in calibration: not quantized, or E4M3 for each token, which is what is measured",
    )
    given = parser.parse_args()
    package, numbers = METHODS[given.method]

    tokenizer = tokenizer_of(given.model)
    text = Text.named(given.calibration)
    ids = windows(text, tokenizer, given.samples, given.seq_len, given.seed)
    started = time.monotonic()
    if package == "auto-round":
        weights = autoround(given, numbers, tokenizer, ids)
    else:
        weights = llmcompressor(given, numbers, tokenizer, ids)
    seconds = time.monotonic() - started

    model = read(given.model)
    moved = put(model, weights, GROUP[numbers])
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    about = {
        "method": given.method,
        "versions": {name: version(name) for name in (package, "transformers", "torch")},
        "iterations": given.iters if package == "auto-round" else None,
        "activations": given.activations,
        "samples": len(ids),
        "seq_len": given.seq_len,
        "seed": given.seed,
        "bits": BITS[numbers],
        "share_not_rounded": moved,
        "seconds": seconds,
    }
    (given.out / "peer.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(about))


def read(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def targets(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linears in the decoder's blocks by their names in the model."""
    blocks = find_blocks(model)
    return {
        f"{blocks.name(index)}.{name}": linear
        for index, block in enumerate(blocks.modules)
        for name, linear in linears(block)
    }


def autoround(
    given: argparse.Namespace, numbers: str, tokenizer: PreTrainedTokenizerBase, ids: Tensor
) -> dict[str, Tensor]:
    """The dequantized weights by their names, as AutoRound makes them."""
    from auto_round import AutoRound

    model = read(given.model)
    names = list(targets(model))
    run = AutoRound(
        model,
        tokenizer=tokenizer,
        scheme=AUTOROUND[numbers] | AUTOROUND[given.activations],
        dataset=list(ids.split(1)),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        iters=given.iters,
        seed=given.seed,
        device_map="cpu",
        amp=False,  # float32, as everything else here
        enable_torch_compile=False,
    )
    quantized, _ = run.quantize()
    found = dict(quantized.named_modules())
    layers = {name: getattr(found[name], "orig_layer", found[name]) for name in names}
    return {name: layer.weight.detach().float() for name, layer in layers.items()}


def llmcompressor(
    given: argparse.Namespace, numbers: str, tokenizer: PreTrainedTokenizerBase, ids: Tensor
) -> dict[str, Tensor]:
    """The dequantized weights by their names, as llm-compressor's GPTQ makes them."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        preset_name_to_scheme,
    )
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    preset = {"int4": "W4A16", "mxfp4": "MXFP4A16"}[numbers]
    fp8 = QuantizationArgs(num_bits=8, type="float", strategy="token", symmetric=True, dynamic=True)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=preset_name_to_scheme(preset, ["Linear"]).weights,
        input_activations=fp8 if given.activations == "fp8" else None,
    )
    model = read(given.model)
    names = list(targets(model))
    others = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=sorted(others - set(names))),
    )
    weights = {}
    for name in names:
        layer = model.get_submodule(name)
        weight = layer.weight.detach().float()
        if numbers == "int4":
            scale = layer.weight_scale.float().repeat_interleave(GROUP["int4"], 1)
            weight = torch.round(weight / scale) * scale.half()
        weights[name] = weight
    return weights


def put(model: PreTrainedModel, weights: dict[str, Tensor], group: int) -> float:
    """Write weights into the model; returns the share that is not what rounding would give."""
    moved = total = 0
    for name, linear in targets(model).items():
        new = weights[name].unflatten(1, (-1, group))
        old = linear.weight.data.unflatten(1, (-1, group))
        values = new.sort(-1).values.contiguous()
        if int((values.diff(dim=-1) > 0).sum(-1).max()) >= LEVELS:
            raise SystemExit(f"{name}: a group has more values than four bits tell apart")
        above = torch.searchsorted(values, old).clamp_max(group - 1)
        below = (above - 1).clamp_min(0)
        ends = torch.stack([values.gather(-1, above), values.gather(-1, below)])
        nearest = (ends - old).abs().amin(0)
        moved += int(((new - old).abs() > nearest * (1 + 1e-5)).sum())
        total += old.numel()
        linear.weight.data = weights[name].contiguous()
    return moved / total


if __name__ == "__main__":
    main()
