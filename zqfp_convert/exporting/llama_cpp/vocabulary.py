"""The tokenizer of a model in llama.cpp's terms.

llama.cpp splits text before the merges by expressions of its own, which it knows by name; a
tokenizer whose splitting has no such name here is refused rather than written nearly right.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from zqfp_convert.errors import SourceError
from zqfp_convert.model.tokenizer import tokenizer_of

TOKENIZER_FILE = "tokenizer.json"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
# Regular expressions by the names that llama.cpp has for what splits the same.
EXPRESSIONS = {
    CONTRACTIONS + WORDS + r"\p{N}{1,3}" + REST: "llama-bpe",
    CONTRACTIONS + WORDS + r"\p{N}" + REST: "qwen2",
}


def write(folder: Path, rows: int, writer: gguf.GGUFWriter) -> None:
    """Write the tokenizer of a model's folder; `rows` is how many tokens the model embeds.

    Raises:
        SourceError: there is none, or none that can be spelled for llama.cpp.
    """
    tokenizer = tokenizer_of(folder)
    described = _read(folder)
    pre = _pre_tokenizer(described)
    if pre is None:
        raise _refused(folder, "a tokenizer that splits text in a way not known here")
    tokens = {number: token for token, number in described["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in described["added_tokens"]:
        tokens[added["id"]] = added["content"]
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        kinds[added["id"]] = special
    if max(tokens) >= rows:
        raise _refused(folder, f"token {max(tokens)}, where the model embeds {rows}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types([kinds.get(number, gguf.TokenType.UNUSED) for number in range(rows)])
    merges = described["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    _write_special(tokenizer, writer)


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
        raise _refused(folder, f"no {TOKENIZER_FILE}")
    described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    model = described["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _refused(folder, f"a {model.get('type')} tokenizer that does not work on bytes")
    if (described.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
        raise _refused(folder, "a tokenizer that changes the text first")
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
        needed="a BPE tokenizer of bytes, of GPT-2's, SmolLM's, Llama 3's or Qwen 2's kind",
        do="Export --to bf16, and convert that with llama.cpp's own script.",
    )
