"""The tokenizer of a model in llama.cpp's terms.

llama.cpp splits text before the merges by expressions of its own, which it knows by name; a
tokenizer whose splitting has no such name here is refused rather than written nearly right.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from zqfp_convert.errors import SourceError
from zqfp_convert.model.tokenizer import tokenizer_of

TOKENIZER_FILE = "tokenizer.json"
PIECES_FILE = "tokenizer.model"
LEAST = -1000.0  # score of tokens that nothing is merged to
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
# Regular expressions by the names that llama.cpp has for what splits the same.
EXPRESSIONS = {
    CONTRACTIONS + WORDS + r"\p{N}{1,3}" + REST: "llama-bpe",
    CONTRACTIONS + WORDS + r"\p{N}" + REST: "qwen2",
}


@dataclass(frozen=True)
class Token:
    """A token as GGUF has it."""

    text: str
    kind: gguf.TokenType
    score: float = LEAST


def write(folder: Path, rows: int, writer: gguf.GGUFWriter) -> None:
    """Write the tokenizer of a model's folder; `rows` is how many tokens the model embeds.

    Raises:
        SourceError: there is none, or none that can be spelled for llama.cpp.
    """
    tokenizer = tokenizer_of(folder)
    described = _read(folder)
    pieces = (folder / PIECES_FILE).is_file() and described["model"].get("byte_fallback", True)
    tokens = _pieces(folder, tokenizer, writer) if pieces else _bytes(folder, described, writer)
    for number, added in tokenizer.added_tokens_decoder.items():
        kind = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
        if number not in tokens or tokens[number].kind is gguf.TokenType.NORMAL:
            tokens[number] = Token(added.content, kind)
    if max(tokens) >= rows:
        raise _refused(folder, f"token {max(tokens)}, where the model embeds {rows}")
    listed = [
        tokens.get(number, Token(f"[PAD{number}]", gguf.TokenType.UNUSED)) for number in range(rows)
    ]
    writer.add_token_list([token.text for token in listed])
    writer.add_token_types([token.kind for token in listed])
    if pieces:
        writer.add_token_scores([token.score for token in listed])
    _write_special(tokenizer, writer)


def _bytes(folder: Path, described: dict[str, Any], writer: gguf.GGUFWriter) -> dict[int, Token]:
    """The tokens of a tokenizer of bytes, by their numbers; how it splits and merges is written."""
    model = described["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _refused(folder, f"a {model.get('type')} tokenizer that does not work on bytes")
    if (described.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
        raise _refused(folder, "a tokenizer that changes the text first")
    pre = _pre_tokenizer(described)
    if pre is None:
        raise _refused(folder, "a tokenizer that splits text in a way not known here")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    merges = model["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    return {number: Token(text, gguf.TokenType.NORMAL) for text, number in model["vocab"].items()}


def _pieces(
    folder: Path, tokenizer: PreTrainedTokenizerBase, writer: gguf.GGUFWriter
) -> dict[int, Token]:
    """The tokens of a SentencePiece model, as Llama 2 and Mistral have, by their numbers."""
    if find_spec("sentencepiece") is None:
        raise SourceError(
            str(folder / PIECES_FILE),
            "a SentencePiece model, and the package sentencepiece is not installed",
            needed="that package, which reads it",
            do="pip install 'zqfp-convert[gguf]', or pip install sentencepiece.",
        )
    found = [
        Token(text.decode(), kind, score)
        for text, score, kind in gguf.SentencePieceVocab(folder).sentencepiece_tokens()
    ]
    # llama.cpp merges by scores: those of BPE are ranks, those of other models probabilities
    normal = [token.score for token in found if token.kind is gguf.TokenType.NORMAL]
    if not all(score == int(score) for score in normal):
        raise _refused(folder, "a SentencePiece model that does not merge pairs")
    known = tokenizer.convert_ids_to_tokens(list(range(len(found))))
    if known != [token.text for token in found]:
        raise _refused(folder, f"a {PIECES_FILE} with other tokens than the tokenizer's")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    return dict(enumerate(found))


def _write_special(tokenizer: PreTrainedTokenizerBase, writer: gguf.GGUFWriter) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None:
        writer.add_bos_token_id(bos)
    if eos is not None:
        writer.add_eos_token_id(eos)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bos is not None and ids[0] == bos and len(ids) > len(plain))
    writer.add_add_eos_token(
        eos is not None and ids[-1] == eos and len(ids) > len(plain) and plain[-1:] != ids[-1:]
    )
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return {"model": {}}
    described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return described


def _pre_tokenizer(described: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer of bytes splits text; None if there is none here."""
    first = described.get("pre_tokenizer") or {}
    steps = first["pretokenizers"] if first.get("type") == "Sequence" else [first]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    whole = bool(described["model"].get("ignore_merges"))
    match steps[:-1], steps[-1].get("use_regex", True):
        case [], True:
            found = "gpt-2"
        case [{"type": "Digits", "individual_digits": True}], True:
            found = "smollm"
        case [{"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"}], False:
            found = EXPRESSIONS.get(regex, "")
        case _:
            found = ""
    # Of these only llama-bpe takes a word that is a token as it is, without its merges.
    return found if found and whole == (found == "llama-bpe") else None


def _refused(folder: Path, found: str) -> SourceError:
    return SourceError(
        str(folder),
        found,
        needed="a BPE tokenizer of bytes, of GPT-2's, SmolLM's, Llama 3's or Qwen 2's kind, or a "
        "SentencePiece model that merges pairs",
        do="Export --to bf16, and convert that with llama.cpp's own script.",
    )
