"""The packed layers of a trained model in a real vLLM engine, one by one, beside our loader's.

Activations are rounded to FP8, so where two programs differ in the last bit of a float32, now and
then one is rounded the other way, and all that follows differs by the noise of FP8. What is served
can therefore be compared to within that noise only (`served.py`). Here it is taken out. First each
layer of ours gets the very input that vLLM's has had, in float32: what comes out may differ by the
order of sums. Then both models run with activations that are not rounded: what they say of a text
may differ by as much as two programs in float32 do.

`make test-vllm` runs it; by hand: python tests/with_vllm/layers.py
"""

from __future__ import annotations

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, to look at its model
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import tempfile
from pathlib import Path
from unittest import mock

import torch
import vllm
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

import zqfp_convert
from zqfp_convert.runtime import reference

DEMO = Path(zqfp_convert.__file__).parent / "demo" / "model"
TOKENS = 200
PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
LAYER, WHOLE = 1e-5, 1e-4  # of the largest output; in log-probability

Seen = dict[str, tuple[Tensor, Tensor]]  # input and output of layers by name


def not_rounded(
    x: Tensor,
    weight: Tensor,
    lorc: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    input_offset: Tensor | None,
) -> Tensor:
    """`reference.linear` with the activation as it is."""
    assert input_offset is None
    y = functional.linear(x, weight)
    if lorc is not None:
        y = y + functional.linear(functional.linear(x, lorc[0]), lorc[1])
    return y if bias is None else y + bias


def scored(engine: vllm.LLM, ids: list[int]) -> Tensor:
    """The log-probability of each token but the first, after those before it."""
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    output = engine.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0]
    places = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    return torch.tensor([each[token].logprob for token, each in places])


def ours(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """The same by our loader's model."""
    logits = model(torch.tensor([ids])).logits[0]
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def watched(model: nn.Module, seen: Seen) -> int:
    """Have the inputs and outputs of the packed linears kept; how many there are."""
    linears = [one for one in model.named_modules() if one[0].rpartition(".")[2] in PARTS]
    for name, linear in linears:

        def keep(_: nn.Module, inputs: tuple[Tensor], output: object, name: str = name) -> None:
            y = output[0] if isinstance(output, tuple) else output
            seen[name] = inputs[0].clone(), y.clone()

        linear.register_forward_hook(keep)
    return len(linears)


def farthest(model: PreTrainedModel, seen: Seen, tokens: int) -> float:
    """The largest difference of our layers' outputs for vLLM's inputs, of the largest output."""
    worst = 0.0
    for name, (x, theirs) in seen.items():
        above, _, leaf = name.rpartition(".")
        mine = [model.get_submodule(f"{above}.{part}")(x[:tokens]) for part in PARTS[leaf]]
        together = torch.cat(mine, -1)
        difference = (together - theirs[:tokens]).abs().max() / together.abs().max()
        worst = max(worst, float(difference))
    return worst


@torch.no_grad()
def main() -> None:
    """Compare, print, and end with an error where something differs."""
    with tempfile.TemporaryDirectory() as scratch:
        packed = Path(scratch) / "packed"
        options = {"samples": 16, "seq_len": 128, "group_size": 32, "low_rank_rounds": 1}
        zqfp_convert.convert(DEMO, packed, device="cpu", **options)
        model = zqfp_convert.load(packed, "cpu", torch.float32)
        torch.manual_seed(0)
        settings = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": None}
        start = torch.tensor([[model.config.bos_token_id]])
        ids = model.generate(start, max_new_tokens=TOKENS, **settings)[0].tolist()
        engine = vllm.LLM(str(packed), dtype="float32", enforce_eager=True, max_model_len=256)
        seen: Seen = {}
        linears = engine.apply_model(lambda theirs: watched(theirs, seen))[0]

        rounded = float((scored(engine, ids) - ours(model, ids)).abs().max())
        assert len(seen) == linears > 0
        layer = farthest(model, seen, len(ids))
        with mock.patch.object(reference, "linear", not_rounded):
            whole = float((scored(engine, ids) - ours(model, ids)).abs().max())

    print(f"{linears} layers, the same input: {layer:.1e} of the largest output at most")
    print(f"log-probabilities of {len(ids) - 1} tokens without rounding: {whole:.1e} at most")
    print(f"log-probabilities of {len(ids) - 1} tokens with rounding: {rounded:.1e} at most")
    assert layer <= LAYER, layer
    assert whole <= WHOLE, whole


if __name__ == "__main__":
    main()
