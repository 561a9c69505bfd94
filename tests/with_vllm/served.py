"""Packed models served by a real vLLM over HTTP, beside the same ones in `zqfp_convert.load`.

For each case a model is converted and served with `vllm serve`, on the CPU. Our loader writes
continuations of 64 tokens; these are given to the server as prompts, and at each of their positions
its top token and the log-probability of the token that stands there are compared with ours, from
one pass over the whole text. What has to hold: at least 98 % of the top tokens agree; where they do
not, our two best are less than 0.05 apart; log-probabilities differ by 0.02 at most in the mean.

Activations are rounded to FP8, so where two programs differ in the last bit of a float32, now and
then one is rounded the other way, and from there on all that follows differs by the rounding noise
of FP8. In small random models that is rare, and all three rules have to hold. In the trained
demonstration model, and in bfloat16, most texts meet it. How far it goes is what our loader shows
when the last bit of its embeddings is changed: its figures with itself stand beside, and there
vLLM's may be a quarter worse at most. That the layers are the same ones but for that rounding,
`layers.py` proves.

With several ranks row-parallel linears quantize the part of their input that a rank has; so does
our loader's model then.

`make test-vllm` runs it; by hand: python tests/with_vllm/served.py [--only NAME...] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers as hf
from architectures import configuration, random_model, write_tokenizer
from mixtures import BASE, MIXTURES
from server import Server
from torch import Tensor, nn

import zqfp_convert
from zqfp_convert.runtime.linear import QuantizedLinear, Scratch
from zqfp_convert.serving import part

AGREEMENT, GAP, DIFFERENCE = 0.98, 0.05, 0.02
WORSE, CHANGES = 1.25, 4  # than our loader with itself, over so many changes
PROMPTS, PROMPT, NEW = 32, 16, 64
ROW_PARALLEL = ("o_proj", "down_proj")
DEMO = Path(zqfp_convert.__file__).parent / "demo" / "model"
QUICK = {"device": "cpu", "samples": 16, "seq_len": 128, "group_size": 32, "low_rank_rounds": 1}


@dataclass(frozen=True)
class Case:
    """A model, how it is converted, and how it is served.

    Attributes:
        name: of the case.
        arch: of the random model, or None for the demonstration model.
        changes: to the random model's configuration.
        convert: options of the conversion.
        dtype: of the activations.
        ranks: that serve it together.
        compiled: as vLLM does by itself; else with --enforce-eager, which starts sooner.
        itself: it has to be about as near to our loader as that is to itself, and keeps no rules.
    """

    name: str
    arch: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    convert: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    ranks: int = 1
    compiled: bool = False
    itself: bool = False


WIDE = {"hidden_size": 128, "max_position_embeddings": 256}
CASES = [
    Case("Llama", "llama", {**WIDE, "num_attention_heads": 4, "intermediate_size": 256},
         compiled=True),
    Case("Llama, one key head, groups of a row", "llama",
         {**WIDE, "num_key_value_heads": 1, "intermediate_size": 172},
         {"group_size": "row", "recipe": "fast", "rank": 8, "scales": "m1"}, ranks=2),
    Case("OPT, centered", "opt", {**WIDE, "word_embed_proj_dim": 128}),
    Case("Falcon, biases added", "falcon", WIDE),
    Case("Mixtral", "mixtral", {**WIDE, "intermediate_size": 64, "head_dim": 32}, ranks=2),
    Case("demonstration", compiled=True, itself=True),
    Case("demonstration", ranks=2, itself=True),
    Case("demonstration", dtype="bfloat16", itself=True),
]  # fmt: skip


def source(case: Case, folder: Path) -> Path:
    """The model to convert."""
    if case.arch is None:
        return DEMO
    if not folder.exists():
        if case.arch in MIXTURES:
            kind, settings = MIXTURES[case.arch]
            config = getattr(hf, kind)(**BASE | settings | case.changes)
        else:
            config = configuration(case.arch, **case.changes)
        random_model(config).save_pretrained(folder)
        write_tokenizer(folder)
    return folder


class Shared(nn.Module):
    """A row-parallel linear: each rank multiplies, and quantizes, its part of the input."""

    def __init__(self, linear: QuantizedLinear, ranks: int) -> None:
        super().__init__()
        layer, self._width = linear.packed(), linear.in_features // ranks
        starts = [rank * self._width for rank in range(ranks)]
        parts = [part.of_columns(layer, start, self._width) for start in starts]
        biases = [linear.bias, *[None] * (ranks - 1)]
        self.parts = nn.ModuleList(
            QuantizedLinear(one, bias, Scratch(), linear.dtype)
            for one, bias in zip(parts, biases, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        inputs = x.split(self._width, -1)
        return sum(linear(one) for linear, one in zip(self.parts, inputs, strict=True))


def load(case: Case, folder: Path) -> hf.PreTrainedModel:
    """The case's model in our loader."""
    model = zqfp_convert.load(folder, "cpu", getattr(torch, case.dtype))
    for name, linear in [*model.named_modules()]:
        if case.ranks > 1 and name.rpartition(".")[2] in ROW_PARALLEL:
            model.set_submodule(name, Shared(linear, case.ranks))
    return model


def texts(model: hf.PreTrainedModel) -> Tensor:
    """Prompts that the model draws at random with its greedy continuations, int64 `[32, 81]`."""
    torch.manual_seed(0)
    first = torch.full((PROMPTS, 1), model.config.bos_token_id)

    def more(tokens: Tensor, count: int, **settings: Any) -> Tensor:
        seen = torch.ones_like(tokens)  # token 0 too, which may stand for padding
        settings |= {"attention_mask": seen, "pad_token_id": 0, "eos_token_id": None}
        return model.generate(tokens, max_new_tokens=count, **settings)

    return more(more(first, PROMPT, do_sample=True, top_k=0), NEW, do_sample=False)


def distributions(model: hf.PreTrainedModel, tokens: Tensor) -> Tensor:
    """Log-probabilities for the continuations' places in one pass, `[32, 64, V]`."""
    with torch.no_grad():
        logits = torch.cat([model(some).logits for some in tokens.split(8)])
    return logits[:, -NEW - 1 : -1].float().log_softmax(-1)


def with_itself(model: hf.PreTrainedModel, tokens: Tensor, ours: Tensor) -> Figures:
    """How near the loader is to itself when the last bit of all embeddings is changed."""

    def change(_: nn.Module, inputs: object, output: Tensor) -> Tensor:
        up = torch.rand(output.shape) < 0.5
        return output.nextafter(torch.where(up, torch.inf, -torch.inf).to(output.dtype))

    handle = model.get_input_embeddings().register_forward_hook(change)
    torch.manual_seed(0)
    every = torch.cat([distributions(model, tokens) for _ in range(CHANGES)])
    handle.remove()
    repeated = tokens.repeat(CHANGES, 1)
    given = every.gather(-1, repeated[:, -NEW:, None])[..., 0]
    return Figures.of(every.argmax(-1), given, ours.repeat(CHANGES, 1, 1), repeated)


@dataclass(frozen=True)
class Figures:
    """How near somebody is to our loader.

    Attributes:
        agreement: share of places with the same top token.
        gap: the largest difference of our two best log-probabilities where the top tokens differ.
        mean: mean absolute difference of the log-probabilities of the tokens that stand there.
    """

    agreement: float
    gap: float
    mean: float

    @classmethod
    def of(cls, top: Tensor, given: Tensor, ours: Tensor, tokens: Tensor) -> Figures:
        """From top tokens and log-probabilities `[32, 64]`, ours `[32, 64, V]`, and the texts."""
        best = ours.topk(2)
        other = best.indices[..., 0] != top
        gaps = (best.values[..., 0] - best.values[..., 1])[other]
        here = ours.gather(-1, tokens[:, -NEW:, None])[..., 0]
        mean = float((here - given).abs().mean())
        return cls(1 - float(other.float().mean()), max([0.0, *gaps.tolist()]), mean)

    def keep_rules(self) -> bool:
        """Whether they are what is asked of any program."""
        return self.agreement >= AGREEMENT and self.gap < GAP and self.mean <= DIFFERENCE

    def are_near(self, own: Figures) -> bool:
        """Whether they are about those of the loader with itself."""
        differ = 1 - self.agreement <= WORSE * (1 - own.agreement)
        return differ and self.mean <= WORSE * own.mean

    def __str__(self) -> str:
        return f"{self.agreement:.2%} | {self.gap:.3f} | {self.mean:.6f}"


def served(server: Server, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The server's top tokens, and its log-probabilities of those that stand there, `[32, 64]`."""
    top, given = [], []
    for text, choice in zip(
        tokens.tolist(),
        server.complete(tokens.tolist(), max_tokens=1, prompt_logprobs=1),
        strict=True,
    ):
        places = choice["prompt_logprobs"][-NEW:]
        top.append([next(int(k) for k, v in at.items() if v["rank"] == 1) for at in places])
        pairs = zip(text[-NEW:], places, strict=True)
        given.append([at[str(token)]["logprob"] for token, at in pairs])
    return torch.tensor(top), torch.tensor(given)


def greedy(server: Server, tokens: Tensor) -> float:
    """How many of 64 tokens are ours when the server writes them itself, in the mean."""
    prompts = tokens[:, :-NEW].tolist()
    settings = {"max_tokens": NEW, "ignore_eos": True, "return_token_ids": True}
    written = torch.tensor([one["token_ids"] for one in server.complete(prompts, **settings)])
    return float(written.eq(tokens[:, -NEW:]).long().cumprod(1).sum(1).float().mean())


def main() -> None:
    """Run the cases, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--keep", type=Path, help="a folder for models and logs")
    options = parser.parse_args()
    hf.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.keep or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        chosen = [case for case in CASES if not options.only or case.name in options.only]
        print("| model | activations | ranks | same top token | largest gap where not | mean "
              "difference | same greedy tokens of 64 | loader with itself: same | gap | mean | "
              "rule kept |")  # fmt: skip
        print("|" + "---|" * 11)
        failed = 0
        for number, case in enumerate(chosen):
            began = time.monotonic()
            out = work / f"{case.name}-packed"
            if not out.exists():
                zqfp_convert.convert(source(case, work / case.name), out, **QUICK | case.convert)
            model = load(case, out)
            tokens = texts(model)
            ours = distributions(model, tokens)
            own = with_itself(model, tokens, ours)
            settings = ["--dtype", case.dtype, "--max-model-len", "128", "--max-num-seqs", "32"]
            settings += [] if case.compiled else ["--enforce-eager"]
            with Server(out, work / f"serve-{number}.log", case.ranks, *settings) as server:
                theirs = Figures.of(*served(server, tokens), ours, tokens)
                same = greedy(server, tokens)
            holds = theirs.are_near(own) if case.itself else theirs.keep_rules()
            rule = "near itself" if case.itself else "all three"
            failed += not holds
            about = f"{case.name} | {case.dtype} | {case.ranks}"
            print(
                f"| {about} | {theirs} | {same:.1f} | {own} | {rule}{'' if holds else ': NO'} |",
                flush=True,
            )
            print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
        if failed:
            raise SystemExit(f"{failed} of {len(chosen)} do not hold")


if __name__ == "__main__":
    main()
