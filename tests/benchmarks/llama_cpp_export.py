"""A GGUF export in llama.cpp itself, beside the dequantized model in transformers.

Compares the tokens of a text, the logits at each of them (relative Frobenius error, KL, likeliest
token), and, where the export has an adapter, the same with it. The reference is the bfloat16 export
of the same checkpoint, in float32, its compensation taken off again where there is no adapter.
llama.cpp quantizes activations to 8 bits in blocks of 32, which is most of the difference.

    pip install llama-cpp-python        # compiles llama.cpp: cmake, a C++ compiler, minutes
    python tests/benchmarks/llama_cpp_export.py OUT/
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from llama_cpp import Llama
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import zqfp_convert
from zqfp_convert.checkpoint.reader import PackedCheckpoint

TEXT = (
    "Once upon a time there was a king who had 1234 ships, and it's said that he couldn't count\n\n"
    "them   all — naïve as he was. One day"
)


def reference(checkpoint: Path, plain: Path, *, merged: bool) -> PreTrainedModel:
    """The model in float32, of unrounded weights."""
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    packed = PackedCheckpoint(checkpoint)
    for name in packed.layers:
        layer = packed.layer(name)
        weight = layer.approximation() if merged else layer.dequantize()
        model.get_submodule(name).weight.data = weight
    return model.eval()


def compare(have: Tensor, want: Tensor) -> str:
    """In words, how far logits `[tokens, vocabulary]` are apart."""
    error = float((have - want).norm() / want.norm())
    ours, theirs = want.log_softmax(-1), have.log_softmax(-1)
    kl = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    same = float((have.argmax(-1) == want.argmax(-1)).float().mean())
    return f"relative error {error:.4f}, KL {kl:.6f}, same top {same:.1%} of {len(want)} tokens"


@torch.no_grad()
def main() -> None:
    """Export, load, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    checkpoint = parser.parse_args().checkpoint
    ids = AutoTokenizer.from_pretrained(checkpoint)(TEXT)["input_ids"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = zqfp_convert.export(checkpoint, folder / "gguf", "gguf")
        zqfp_convert.export(checkpoint, folder / "bf16", "bf16")
        for adapter in [None, made.adapter] if made.adapter else [None]:
            lora = {} if adapter is None else {"lora_path": str(adapter)}
            file = str(made.dest / "gguf-mxfp4.gguf")
            program = Llama(file, n_ctx=512, logits_all=True, verbose=False, **lora)
            tokens = program.tokenize(TEXT.encode(), add_bos=True)
            program.eval(ids)
            have = torch.tensor(np.array(program.scores[: len(ids)]))
            model = reference(checkpoint, folder / "bf16", merged=adapter is not None)
            want = model(torch.tensor([ids])).logits[0]
            print("with the adapter:" if adapter else "without adapter:", compare(have, want))
            print("tokens", "are the same" if tokens == ids else f"differ: {tokens}, {ids}")


if __name__ == "__main__":
    main()
