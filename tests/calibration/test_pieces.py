"""Where text is cut, and that a tokenizer does not notice."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from zqfp_convert.calibration import pieces

WORDS = ["one", "two", "three", "Grüße", "日本", "x = 1;", "don't", '"So!"', "42"]
BETWEEN = [" ", " ", " ", " ", "\n", "\n\n", "\n    ", "  ", "\t", "\n\n\n", " \n"]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def prose(words: int, between: list[str] = BETWEEN) -> str:
    generator = random.Random(0)
    return "".join(generator.choice(WORDS) + generator.choice(between) for _ in range(words))


@pytest.mark.parametrize("between", [BETWEEN, [" "], ["\n"], ["\n\n"], ["\n\n    "], [""], ["\r"]])
def test_pieces_are_the_text(between: list[str]) -> None:
    text = prose(30_000, between)
    found = list(pieces.of_document(text))
    assert "".join(found) == text
    assert len(found) > 2
    assert all(pieces.LENGTH // 2 <= len(piece) <= pieces.LENGTH for piece in found[:-1])
    if between != [""]:
        for piece in found[:-1]:
            assert piece.endswith((*WORDS, "x", "=", "\n"))


@pytest.mark.parametrize("text", ["", "short", " ", "\n"])
def test_a_short_text_is_one_piece(text: str) -> None:
    assert list(pieces.of_document(text)) == [text]


def test_lines_come_before_words() -> None:
    line, word = "a b c\n", "d e f g h "
    lines, words = line * (pieces.LENGTH // 8), word * (pieces.LENGTH // 12)
    first, *rest = pieces.of_document(lines + words)
    assert first == lines
    assert rest[0].startswith(word)
    first, *rest = pieces.of_document(line + words + words)  # the line ends too early
    assert pieces.LENGTH - 4 <= len(first) <= pieces.LENGTH
    assert rest[0].startswith(" ")


@pytest.mark.parametrize("rules", ["gpt-2", "llama-3"])
def test_tokens_of_the_pieces_are_those_of_the_whole(rules: str) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    if rules == "gpt-2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    text = prose(40_000)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    want = tokenizer.encode(text).ids
    found = [id_ for piece in pieces.of_document(text) for id_ in tokenizer.encode(piece).ids]
    assert found == want


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("length", [50, 1001, pieces.LENGTH])
def test_a_file(ends: str, length: int, tmp_path: Path) -> None:
    text = prose(9_000)
    content = text.replace("\n", ends).encode()
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    found = list(pieces.of_file(file, length=length))
    assert "".join(piece for piece, _ in found) == text
    assert found[-1][1] == len(content)
    for (_, start), (piece, end) in pairwise(found):
        assert content[start:end].decode().replace(ends, "\n") == piece
        assert len(piece) <= length
    assert list(pieces.of_file(file, found[0][1], length)) == found[1:]


def test_where_text_begins_behind_a_place(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    content = "one two\n  \nthrée four".encode()
    file.write_bytes(content)
    assert pieces.beginning(file, 0) == 0
    assert {pieces.beginning(file, place) for place in range(1, 12)} == {11}  # a line
    assert content[11:].startswith(b"thr")
    four = content.index(b"four")
    assert {pieces.beginning(file, place) for place in range(12, four + 1)} == {four}  # a word
    in_a_character = content.index("é".encode()) + 1
    file.write_bytes(content[: four - 1])
    assert pieces.beginning(file, in_a_character) == in_a_character + 1
    assert pieces.beginning(file, four - 1) == four - 1


def test_a_line_far_away_is_not_looked_for(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a bc " * pieces.LOOKED_AT + "\nd")
    assert pieces.beginning(file, 3) == 5
