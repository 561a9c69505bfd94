"""Memory and time of tuning a whole model of Llama-3.1-8B's layers, on a GPU.

    python tests/benchmarks/tuning.py [--layers 32] [--steps 4] [--codes-stay] [--json FILE]

Method: nothing is converted and nothing downloaded. Each layer's weights are random, and quantized
by plain rounding (scales m2 in groups of 128, `--rank` random factors); windows are random tokens.
What a conversion would have at hand, the original's hidden states behind the last block, comes from
the same random weights before they are rounded. From there on it is the product's own `distill`.
The first step warms up and is not counted; the peak is torch's count of allocated GPU memory from
when the linears wait to the end, the estimate is the one that a conversion's plan has for this
part. Prints a table and a JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from zqfp_convert.distill import memory
from zqfp_convert.distill.train import WINDOWS_AT_ONCE, Outcome, distill
from zqfp_convert.distill.tunable import TunableLinear, tunables
from zqfp_convert.model import skeleton
from zqfp_convert.model.blocks import Blocks, find_blocks, linears, put
from zqfp_convert.model.device import compute_dtype, resolve_device
from zqfp_convert.quantize.lorc import encode
from zqfp_convert.quantize.weight import QuantizedWeight, quantize_weight
from zqfp_convert.recipe import Recipe

SPREAD = 0.02  # of random weights
DOUBT = 0.01  # relative to them: how far from its weight a place starts


def empty_model(given: argparse.Namespace, device: torch.device) -> LlamaForCausalLM:
    """The layers of Llama-3.1-8B, or narrower ones of the same proportions, without weights."""
    config = LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 7 // 2,
        num_hidden_layers=given.layers,
        num_attention_heads=max(1, given.hidden // 128),
        num_key_value_heads=max(1, given.hidden // 512),
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        dtype="bfloat16",
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    folder = Path(given.folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    model: LlamaForCausalLM = skeleton.build(folder, device)
    return model


def random_values(model: nn.Module, names: list[str], device: torch.device) -> None:
    """Give parameters random values; norms ones."""
    dtype = compute_dtype(device, torch.bfloat16)
    for name in names:
        extents = model.get_parameter(name).shape
        value = torch.ones(extents, device=device, dtype=dtype)
        if len(extents) > 1:
            value.normal_(std=SPREAD)
        skeleton.assign(model, {name: value}, dtype)


def rounded(weight: Tensor, recipe: Recipe, *, roundings: bool) -> TunableLinear:
    """A linear to be tuned, by rounding alone."""
    plain = recipe.changed(solver="round", rank=0, tune=0, scale_rounding="floor", codebooks="e2m1")
    solved = quantize_weight(weight, None, plain)
    rows, columns = weight.shape
    factors = None
    if recipe.rank > 0:
        B, A = torch.randn(rows, recipe.rank), torch.randn(recipe.rank, columns)
        factors = encode(B.to(weight.device) * SPREAD / 30, A.to(weight.device), recipe.factors)
    doubt = weight.float() * (1 + DOUBT * torch.randn_like(weight.float()))
    solved = QuantizedWeight(solved.codes, solved.scales, factors, 0.0, None, doubt)
    return TunableLinear(solved, roundings=roundings)


@torch.no_grad()
def prepare(
    model: LlamaForCausalLM, blocks: Blocks, windows: Tensor, recipe: Recipe, *, roundings: bool
) -> Tensor:
    """Fill the model block by block; returns what the last block gives before it is rounded."""
    device = windows.device
    names = [name for name, _ in model.named_parameters()]
    random_values(model, [n for n in names if not n.startswith(blocks.path)], device)
    states = [model.model.embed_tokens(ids[None]) for ids in windows]
    positions = torch.arange(windows.shape[1], device=device)[None]
    rotary = model.model.rotary_emb(states[0], positions)
    for index, block in enumerate(blocks.modules):
        inside = [n for n in names if n.startswith(blocks.name(index) + ".")]
        random_values(model, inside, device)
        for window, state in enumerate(states):
            given = block(state, position_embeddings=rotary, attention_mask=None)
            states[window] = given[0] if isinstance(given, tuple) else given
        for place, linear in [*linears(block)]:
            put(block, place, rounded(linear.weight, recipe, roundings=roundings))
    return torch.cat([state.cpu() for state in states])


def measure(given: argparse.Namespace) -> dict[str, object]:
    """One tuning."""
    device = resolve_device(given.device)
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    samples = WINDOWS_AT_ONCE * 2 + 1  # the last is held back
    recipe = Recipe.named("max", rank=given.rank, samples=samples, seq_len=given.seq_len)
    model = empty_model(given, device)
    blocks = find_blocks(model)
    shapes = [[tuple(linear.weight.shape) for _, linear in linears(b)] for b in blocks.modules]
    windows = torch.randint(given.vocabulary, (samples, given.seq_len))
    roundings = not given.codes_stay
    original = prepare(model, blocks, windows.to(device), recipe, roundings=roundings)
    weights = sum(rows * columns for block in shapes for rows, columns in block)
    own = {id(p) for linear in tunables(model) for p in linear.parameters()}
    rest = sum(p.nbytes for p in model.parameters() if id(p) not in own)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    marks: list[float] = []
    waiting = torch.cuda.memory_allocated() if on_gpu else None

    def report(done: int, total: int) -> None:
        if on_gpu:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    outcome: Outcome = distill(
        model, blocks, original, windows, given.steps + 1, torch.bfloat16, report=report
    )
    steps = [after - before for before, after in pairwise(marks[1:])]
    estimate = memory.tuning(
        shapes,
        recipe,
        roundings=roundings,
        hidden=given.hidden,
        vocabulary=given.vocabulary,
        width=original.element_size(),
        rest=rest,
    )
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    tokens = original.shape[0] * original.shape[1]
    return {
        "machine": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "layers": given.layers,
        "weights": weights,
        "roundings": outcome.roundings,
        "tokens_a_step": WINDOWS_AT_ONCE * given.seq_len,
        "waiting_bytes": waiting,
        "peak_bytes": peak,
        "planned_bytes": estimate,
        "bytes_a_weight_at_the_peak": None if peak is None else peak / weights,
        "seconds_a_step": statistics.median(steps),
        "host_bytes_a_token_of_the_original": original.nbytes / tokens,
        "host_bytes_of_the_original_for_128_windows": original.nbytes // samples * 128,
        "kl_before": outcome.kl_before,
        "kl_after": outcome.kl_after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="after one that warms up")
    parser.add_argument("--codes-stay", action="store_true", help="do not tune roundings")
    parser.add_argument("--device", default=None)
    parser.add_argument("--folder", default="/tmp/zqfp-tuning", help="for a configuration file")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    figures = measure(given)
    table = Table(box=None, show_header=False)
    for name, value in figures.items():
        shown = str(value)
        if value is not None and "bytes" in name and "_a_" not in name:
            shown = f"{value / 1e9:.2f} GB"
        elif isinstance(value, float):
            shown = f"{value:.4g}"
        table.add_row(name.replace("_", " "), "not measured here" if value is None else shown)
    Console(highlight=False).print(table)
    line = json.dumps(figures)
    print(line)
    if given.json:
        given.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
