"""The tokenizer that lies beside a model."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from zqfp_convert.errors import SourceError

WITHOUT = "Download the tokenizer's files; a conversion can do without (leave --calibration out)."


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
            do=WITHOUT,
        ) from error
    # what some versions make of a folder without tokenizer files knows special tokens at most
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise SourceError(
            str(folder),
            "no tokenizer",
            needed="the model's tokenizer, to turn text into tokens",
            do=WITHOUT,
        )
    return tokenizer


def check_tokens(model: PreTrainedModel, folder: Path, ids: Tensor) -> None:
    """Hold token ids, int64 of any shape, to what the model of a folder embeds.

    Raises:
        SourceError: an id that the model does not know.
    """
    embedded = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= embedded:
        raise SourceError(
            str(folder),
            f"the tokenizer gives token {int(ids.max())}, the model embeds {embedded}",
            needed="the tokenizer that belongs to the model",
            do="Download the model and its tokenizer again, from one place.",
        )
