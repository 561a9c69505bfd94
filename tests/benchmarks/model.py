"""Prefill and decoding of a whole model of Llama-3.1-8B's shape, packed and in bfloat16, on a GPU.

    python tests/benchmarks/model.py [--layers 32] [--rank 8] [--json FILE]

Method: nothing is converted. Random codes and exponents, scales m2 in groups of 128 and low-rank
factors in E4M3 are made on the GPU as they would lie on disk, and given to the product's own
`QuantizedLinear`; embeddings, norms and the head are random in bfloat16, as is the whole model
beside it. From there on it is `zqfp-convert bench`: see zqfp_convert/bench. Prints how far it is,
then tables, last the three ratios that matter: decoding after 1024 tokens, prefill of 8192, and GPU
memory of the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlamaConfig, PreTrainedModel

from zqfp_convert.bench import original, traffic
from zqfp_convert.bench.run import held, measure
from zqfp_convert.bench.workload import Workload
from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.cli.bench import show
from zqfp_convert.model import skeleton
from zqfp_convert.model.blocks import find_blocks, linears, put, shape
from zqfp_convert.runtime import siblings
from zqfp_convert.runtime.linear import QuantizedLinear, Scratch

GROUP = 128
console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def write_config(folder: Path, given: argparse.Namespace) -> None:
    """The configuration of Llama-3.1-8B, or of a narrower one of the same proportions."""
    LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 7 // 2,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 128,
        num_key_value_heads=max(1, given.hidden // 512),
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        dtype="bfloat16",
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def random_layer(
    name: str, rows: int, columns: int, rank: int, generator: torch.Generator
) -> PackedLayer:
    """A packed layer `[N, K]` of random bytes that keep the rules of the format, on the GPU."""
    device, groups = generator.device, -(-columns // GROUP)

    def integers(most: int, *extents: int) -> torch.Tensor:
        return torch.randint(
            0, most, extents, dtype=torch.uint8, device=device, generator=generator
        )

    def factor(*extents: int) -> torch.Tensor:
        values = torch.empty(extents, device=device).normal_(generator=generator)
        return values.to(torch.float8_e4m3fn)

    scale = 127 - integers(4, rows, groups)
    scale[:, 0] = 127
    row_scale = torch.empty(rows, device=device).uniform_(0.004, 0.008, generator=generator)
    return PackedLayer(
        name,
        "m2",
        GROUP,
        columns,
        integers(256, rows, -(-columns // 2)),
        scale,
        row_scale.bfloat16(),
        factor(rank, columns) if rank else None,
        factor(rows, rank) if rank else None,
        torch.full((rank,), 1e-3, device=device) if rank else None,
    )


def packed_model(folder: Path, rank: int, device: torch.device) -> PreTrainedModel:
    """The model of a folder's configuration with random quantized linears in its blocks."""
    model = skeleton.build(folder, device)
    generator = torch.Generator(device).manual_seed(0)
    scratch = Scratch()
    for block in find_blocks(model).modules:
        for name, linear in list(linears(block)):
            layer = random_layer(name, *shape(linear), rank, generator)
            put(block, name, QuantizedLinear(layer, None, scratch, original.DTYPE))
    siblings.link(model)
    return original.fill(model, device, generator)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--rank", type=int, default=8, help="of the low-rank factors; 0 for none")
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[8192])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--device", default="cuda", help="cpu, for a try with tiny sizes")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    given = parse()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("model.py measures on a GPU, and there is none here (--device cpu to try it)")
    device = torch.device(given.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    began = time.monotonic()

    def report(text: str, done: int, total: int) -> None:
        counted = f" {done + 1}/{total}" if total else ""
        console.print(f"{time.monotonic() - began:5.0f} s  {text}{counted}")

    work = Workload(tuple(given.prompt_tokens), given.context, given.new_tokens, given.repeats)
    with torch.no_grad(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_config(folder, given)
        work.check(skeleton.build(folder).config)
        report("measuring the memory", 0, 0)
        bandwidth = traffic.read_bandwidth(device)
        report("making the packed model", 0, 0)
        packed = held(lambda: packed_model(folder, given.rank, device), device)
        bf16 = None
        if not given.no_baseline:
            report("making the bf16 model", 0, 0)
            bf16 = held(lambda: original.random(folder, device), device)
        result = measure(packed, bf16, "random weights", work, bandwidth, [], report)
    report("done", 0, 0)
    show(result)
    ratios = result.ratios()
    if ratios is not None:
        prefill = {f"prefill of {n}": ratio for n, ratio in ratios["prefill"].items()}
        memory = ratios["held_bytes"] or ratios["weight_bytes"]
        summary = {f"decode after {given.context}": ratios["decode"], **prefill, "memory": memory}
        told = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in summary.items())
        console.print(f"\npacked against bf16: {told}")
    if given.json is not None:
        sizes = {name: getattr(given, name) for name in ("layers", "hidden", "vocabulary", "rank")}
        given.json.write_text(json.dumps(result.to_json() | {"model": sizes}, indent=2) + "\n")


if __name__ == "__main__":
    main()
