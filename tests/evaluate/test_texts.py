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
