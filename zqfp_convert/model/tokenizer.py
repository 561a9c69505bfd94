"""The tokenizer that lies beside a model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from zqfp_convert.errors import SourceError


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder.

    Raises:
        SourceError: there is none that can be loaded without running the model's own code.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise SourceError(
            str(folder),
            f"no tokenizer can be loaded ({str(error).strip().splitlines()[0][:150]})",
            needed="the model's tokenizer, to turn text into tokens",
            do="Download the tokenizer's files, or do without text (leave --calibration out).",
        ) from error
    # what some versions make of a folder without tokenizer files knows special tokens at most
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise SourceError(
            str(folder),
            "no tokenizer",
            needed="the model's tokenizer, to turn text into tokens",
            do="Download the tokenizer's files, or do without text (leave --calibration out).",
        )
    return tokenizer
