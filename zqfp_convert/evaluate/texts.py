"""Windows of a text to measure on, by the usual protocol for perplexity.

The documents of a file are joined with blank lines and turned into tokens at once, with the special
tokens that the tokenizer puts around a text. The tokens are cut into windows from the first on,
without overlap; what is left at the end is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from zqfp_convert.calibration.text import Text
from zqfp_convert.errors import OptionError

BETWEEN = "\n\n"
BEYOND = 256  # tokens


@dataclass(frozen=True)
class Windows:
    """A text's name and its token ids, int64 `[windows, window]`."""

    name: str
    ids: Tensor


def read(name: str | Path) -> tuple[str, str]:
    """The name and the whole text of a .txt or .jsonl file.

    Raises:
        OptionError: no such file, or one that cannot be read.
    """
    found = Text.named(name)
    if found.file is None:
        raise OptionError(
            f"--text {name}", "no such file", needed="a .txt or .jsonl file", do="Check the path."
        )
    return found.name, BETWEEN.join(found.documents())


def cut(
    name: str, text: str, tokenizer: PreTrainedTokenizerBase, window: int, tokens: int | None
) -> Windows:
    """The windows of a text, of its first `tokens` tokens if so many are wanted at most.

    Raises:
        OptionError: not even one window.
    """
    ids = _first(text, tokenizer, tokens)
    whole = len(ids) // window
    if whole == 0:
        raise OptionError(
            name,
            f"{len(ids)} tokens of text" + (f" (--tokens {tokens})" if tokens else ""),
            needed=f"at least one window of {window} tokens",
            do="Give more text, or a smaller --window.",
        )
    return Windows(name, torch.tensor(ids[: whole * window], dtype=torch.int64).view(-1, window))


def _first(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int | None) -> list[int]:
    """The first tokens of a text, as if all of it were turned into tokens, but with less memory.

    Of a few tokens more than those are, as what stands behind decides over the last ones.
    """
    length = len(text) if tokens is None else BEYOND + 8 * tokens  # characters
    while True:
        ids: list[int] = tokenizer(text[:length], verbose=False)["input_ids"]
        if tokens is None or length >= len(text) or len(ids) >= tokens + BEYOND:
            return ids[:tokens]
        length *= 2
