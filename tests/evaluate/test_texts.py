"""Which windows a text gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import Maker

from zqfp_convert.errors import OptionError
from zqfp_convert.evaluate import texts
from zqfp_convert.model.tokenizer import tokenizer_of


def test_windows_follow_each_other(tiny_model: Maker) -> None:
    text = "".join(chr(32 + index % 90) for index in range(103))
    found = texts.cut("t", text, tokenizer_of(tiny_model()), 10, None)
    assert found.ids.shape == (10, 10)
    assert found.ids.dtype == torch.int64
    assert found.ids.flatten().tolist() == [ord(letter) for letter in text[:100]]
    fewer = texts.cut("t", text, tokenizer_of(tiny_model()), 10, 39)
    assert torch.equal(fewer.ids, found.ids[:3])


@pytest.mark.parametrize("token", [1, 3, 500])
def test_the_first_tokens_take_only_the_beginning_of_a_text(token: int) -> None:
    """Also where many letters make a token, and what ends a text is no part of it."""
    given: list[int] = []

    def tokenizer(text: str, **options: object) -> dict[str, list[int]]:
        given.append(len(text))
        return {"input_ids": [-1, *range(-(-len(text) // token)), -2]}

    text = "x" * 1_000_000
    found = texts.cut("t", text, tokenizer, 10, 100)  # type: ignore[arg-type]
    assert found.ids.flatten().tolist() == [-1, *range(99)]
    assert max(given) < 4 * (100 + texts.BEYOND) * max(token, 8)


def test_documents_are_joined_by_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two", "three")))
    assert texts.read(file) == ("t.jsonl", "one\n\ntwo\n\nthree")
    (tmp_path / "t.txt").write_text("as\n\n\nit is")
    assert texts.read(tmp_path / "t.txt") == ("t.txt", "as\n\n\nit is")


def test_too_short(tiny_model: Maker) -> None:
    with pytest.raises(OptionError, match=r"t\.txt: 9 tokens.*one window of 10"):
        texts.cut("t.txt", "x" * 9, tokenizer_of(tiny_model()), 10, None)
    with pytest.raises(OptionError, match=r"--tokens 8"):
        texts.cut("t.txt", "x" * 99, tokenizer_of(tiny_model()), 10, 8)


def test_nothing_is_looked_for_on_the_hub() -> None:
    with pytest.raises(OptionError, match="no such file"):
        texts.read("user/data")
