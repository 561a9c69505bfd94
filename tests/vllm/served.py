"""Packed models served by a real vLLM over HTTP, beside the same ones in `zqfp_convert.load`.

For each case a model is converted and served with `vllm serve`, on the CPU. Our loader writes
continuations of 64 tokens; these are given to the server as prompts, and at each of their positions
its top token and the log-probability of the token that stands there are compared with ours, from
one pass over the whole text. Fails where fewer than 98 % of the top tokens agree, where they
disagree though our two best are 0.05 or more apart, or where log-probabilities differ by more than
0.02 in the mean.

`make test-vllm` runs it; by hand: python tests/vllm/served.py [--only NAME...] [--keep FOLDER]
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
from architectures import write_model, write_tokenizer
from server import Server
from torch import Tensor

import zqfp_convert

AGREEMENT, GAP, DIFFERENCE = 0.98, 0.05, 0.02
PROMPTS, PROMPT, NEW = 32, 16, 64
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
    """

    name: str
    arch: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    convert: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    ranks: int = 1


WIDE = {"hidden_size": 128, "max_position_embeddings": 256}
CASES = [
    Case("demonstration", convert={"recipe": "best"}),
    Case("demonstration", convert={"recipe": "best"}, dtype="bfloat16"),
    Case("demonstration", convert={"recipe": "best"}, ranks=2),
]


def source(case: Case, folder: Path) -> Path:
    """The model to convert."""
    if case.arch is None:
        return DEMO
    if not folder.exists():
        write_model(folder, case.arch, **case.changes)
        write_tokenizer(folder)
    return folder


def texts(model: hf.PreTrainedModel) -> Tensor:
    """Prompts that the model draws at random, and its greedy continuations, `[32, 81]`."""
    torch.manual_seed(0)
    first = torch.full((PROMPTS, 1), model.config.bos_token_id)

    def more(tokens: Tensor, count: int, **settings: Any) -> Tensor:
        seen = torch.ones_like(tokens)  # token 0 too, which may stand for padding
        settings |= {"attention_mask": seen, "pad_token_id": 0, "eos_token_id": None}
        return model.generate(tokens, max_new_tokens=count, **settings)

    return more(more(first, PROMPT, do_sample=True, top_k=0), NEW, do_sample=False)


def distributions(model: hf.PreTrainedModel, tokens: Tensor) -> Tensor:
    """Log-probabilities of the continuations' tokens `[32, 64, V]`."""
    with torch.no_grad():
        logits = torch.cat([model(part).logits for part in tokens.split(8)])
    return logits[:, -NEW - 1 : -1].float().log_softmax(-1)


def compare(server: Server, tokens: Tensor, ours: Tensor) -> tuple[list[str], bool]:
    """A row of the table, and whether it holds."""
    choices = server.complete(tokens.tolist(), max_tokens=1, prompt_logprobs=2)
    same, gaps, differences = 0, [0.0], []
    for text, choice, mine in zip(tokens.tolist(), choices, ours, strict=True):
        theirs = choice["prompt_logprobs"][-NEW:]
        best = mine.topk(2)
        for at, (token, given) in enumerate(zip(text[-NEW:], theirs, strict=True)):
            top = next(int(key) for key, one in given.items() if one["rank"] == 1)
            if top == int(best.indices[at, 0]):
                same += 1
            else:
                gaps.append(float(best.values[at, 0] - best.values[at, 1]))
            differences.append(abs(given[str(token)]["logprob"] - float(mine[at, token])))
    agreement, mean = same / len(differences), sum(differences) / len(differences)
    written = server.complete(tokens[:, :-NEW].tolist(), max_tokens=NEW, ignore_eos=True,
                              return_token_ids=True)  # fmt: skip
    greedy = [
        sum(torch.tensor(choice["token_ids"]).eq(text[-NEW:]).long().cumprod(0).tolist())
        for choice, text in zip(written, tokens, strict=True)
    ]
    holds = agreement >= AGREEMENT and max(gaps) < GAP and mean <= DIFFERENCE
    row = [
        f"{agreement:.2%}",
        f"{max(gaps):.4f}",
        f"{mean:.5f}",
        f"{sum(greedy) / len(greedy):.1f}",
        "yes" if holds else "NO",
    ]
    return row, holds


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
              "difference of log-probabilities | same greedy tokens of 64 | holds |")  # fmt: skip
        print("|" + "---|" * 8)
        failed = 0
        for number, case in enumerate(chosen):
            began = time.monotonic()
            out = work / f"{case.name}-packed"
            if not out.exists():
                zqfp_convert.convert(source(case, work / case.name), out, **QUICK | case.convert)
            model = zqfp_convert.load(out, dtype=getattr(torch, case.dtype))
            tokens = texts(model)
            ours = distributions(model, tokens)
            ranks = ["--tensor-parallel-size", str(case.ranks)] if case.ranks > 1 else []
            settings = ["--dtype", case.dtype, "--max-model-len", "128", "--max-num-seqs", "32"]
            with Server(out, work / f"serve-{number}.log", *settings, *ranks) as server:
                row, holds = compare(server, tokens, ours)
            failed += not holds
            print(f"| {case.name} | {case.dtype} | {case.ranks} | {' | '.join(row)} |", flush=True)
            print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
        if failed:
            raise SystemExit(f"{failed} of {len(chosen)} do not hold")


if __name__ == "__main__":
    main()
