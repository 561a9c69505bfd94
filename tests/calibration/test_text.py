"""Calibration tokens: from files, from the model itself, and what can be wrong with them."""

from __future__ import annotations

import json
import random
import sys
import tracemalloc
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from architectures import VOCABULARY, configuration, random_model
from transformers import GenerationConfig

from zqfp_convert.calibration import pieces, text
from zqfp_convert.calibration.text import Text
from zqfp_convert.errors import OptionError


class Letters:
    """A tokenizer of one token for each letter."""

    def __call__(self, document: str, **options: object) -> dict[str, list[int]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [ord(letter) for letter in document]}


def write(path: Path, content: str) -> Text:
    path.write_text(content, encoding="utf-8")
    return Text.named(path)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "One.\n\nÜber zwei.\n")
    assert source.name == "a.txt"
    assert list(source.documents()) == ["One.\n\nÜber zwei.\n"]


def test_each_line_of_a_jsonl_file_is_one(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "a\nb", "id": 1}), "", json.dumps({"text": "ü"}), "  "]
    assert list(write(tmp_path / "a.jsonl", "\n".join(lines)).documents()) == ["a\nb", "ü"]


@pytest.mark.parametrize("line", ["{", '{"txt": "a"}', '["text"]', '"text"', "7"])
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(OptionError) as raised:
        list(source.documents())
    assert raised.value.where == f"{tmp_path / 'a.jsonl'}, line 2"


@pytest.mark.parametrize("value", ["null", "5", '["a"]'])
def test_a_text_that_is_no_text(value: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", f'{{"text": {value}}}\n')
    with pytest.raises(OptionError, match="line 1"):
        list(source.documents())


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_not_utf8(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes('{"text": "Grüße"}'.encode("latin-1"))
    with pytest.raises(OptionError, match="UTF-8") as raised:
        list(Text.named(tmp_path / name).documents())
    assert raised.value.where == str(tmp_path / name)


@pytest.mark.parametrize("name", ["a.csv", "a", "a.txt.gz"])
def test_unknown_suffix(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"\.jsonl") as raised:
        write(tmp_path / name, "text")
    assert raised.value.where == str(tmp_path / name)


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "./none", "/none", "~/none"])
def test_no_such_file(name: str) -> None:
    with pytest.raises(OptionError, match="no such file") as raised:
        Text.named(name)
    assert raised.value.where == name


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="a folder"):
        Text.named(tmp_path)


def test_anything_else_is_a_data_set() -> None:
    assert Text.named("someone/texts:en") == Text("someone/texts:en", None)


def test_a_data_set_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OptionError, match=r"zqfp-convert\[datasets\]") as raised:
        list(Text.named("someone/texts").documents())
    assert raised.value.where == "someone/texts"


def test_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load_dataset(*args: object, **options: object) -> Iterator[dict[str, str]]:
        asked.append((*args, options["split"], options["streaming"]))
        return iter([{"text": "a"}, {"text": "b"}])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert list(Text.named("someone/texts:en").documents()) == ["a", "b"]
    assert asked == [("someone/texts", "en", "train", True)]

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("down")

    module.load_dataset = fail  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="down") as raised:
        list(Text.named("someone/texts").documents())
    assert raised.value.where == "someone/texts"


LETTERS = "".join(chr(1000 + i) for i in range(1000))


def test_windows(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", LETTERS)
    windows = text.windows(source, Letters(), 20, 30, seed=0)
    assert windows.shape == (20, 30)
    assert windows.dtype == torch.int64
    first = windows[:, :1]
    assert torch.equal(windows, first + torch.arange(30))  # each a piece of the text
    assert (first[1:] - first[:-1] >= 30).all()  # none overlaps another
    assert torch.equal(windows, text.windows(source, Letters(), 20, 30, seed=0))
    assert not torch.equal(windows, text.windows(source, Letters(), 20, 30, seed=1))


def test_more_windows_of_the_same_text(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", LETTERS)
    windows, more = text.windows_and_more(source, Letters(), 10, 30, 0, 12)
    assert torch.equal(windows, text.windows(source, Letters(), 10, 30, seed=0))
    assert more.shape == (12, 30)
    every = torch.cat([windows, more]).flatten()
    assert len(every.unique()) == len(every)  # none overlaps another
    _, more = text.windows_and_more(source, Letters(), 10, 30, 0, 500)
    assert more.shape == (23, 30)
    _, more = text.windows_and_more(source, Letters(), 500, 30, 0, 500)
    assert more.shape == (0, 30)


def test_as_many_windows_as_there_are(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", LETTERS)
    assert text.windows(source, Letters(), 500, 30, seed=0).shape == (33, 30)
    assert torch.equal(
        text.windows(source, Letters(), 1, 1000, seed=0), 1000 + torch.arange(1000)[None]
    )
    with pytest.raises(OptionError, match="1000 tokens") as raised:
        text.windows(source, Letters(), 1, 1001, seed=0)
    assert raised.value.where == "a.txt"


def test_documents_are_joined(tmp_path: Path) -> None:
    lines = [json.dumps({"text": letters}) for letters in ("abc", "defg", "hij")]
    source = write(tmp_path / "a.jsonl", "\n".join(lines))
    windows = text.windows(source, Letters(), 1, 10, seed=0)
    assert "".join(map(chr, windows[0])) == "abcdefghij"


def test_no_more_text_is_read_than_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def endless(name: str) -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield LETTERS

    monkeypatch.setattr(text, "_data_set", endless)
    assert text.windows(Text("x", None), Letters(), 2, 10, seed=0).shape == (2, 10)
    assert read < 1100  # of 1000 tokens each: a million is enough


class Numbers:
    """A tokenizer of one token for each number, which keeps account of what it is given."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def __call__(self, document: str, **options: object) -> dict[str, list[int]]:
        self.given.append(len(document))
        return {"input_ids": [int(number) for number in document.split()]}


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """20 MB: the numbers from a million on, eight bytes each."""
    numbers = range(1_000_000, 3_500_000)
    between = [" ", " ", "\n", " ", "\n\n"]
    content = "".join(f"{number}{between[number % 5]}" for number in numbers)
    return write(tmp_path_factory.mktemp("long") / "long.txt", content)


def test_a_long_file_is_read_in_part(long_file: Text) -> None:
    tokenizer = Numbers()
    tracemalloc.start()
    windows, more = text.windows_and_more(long_file, tokenizer, 100, 50, 0, 30)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < text.reading_bytes(100, 50, 30) < 17 << 20
    assert max(tokenizer.given) <= pieces.LENGTH
    assert sum(tokenizer.given) < 13 << 20
    assert windows.shape == (100, 50)
    assert more.shape == (30, 50)
    every = torch.cat([windows, more])
    assert torch.equal(every, every[:, :1] + torch.arange(50))  # each a piece of the text
    assert len(every.unique()) == every.numel()  # none overlaps another


def test_windows_of_a_long_file_come_from_all_over_it(long_file: Text) -> None:
    windows = text.windows(long_file, Numbers(), 200, 50, seed=0)
    tenths = (windows[:, 0] - 1_000_000) // 250_000
    assert (tenths[1:] >= tenths[:-1]).all()  # in the order of the text
    assert int(tenths.bincount(minlength=10).min()) > 5
    assert torch.equal(windows, text.windows(long_file, Numbers(), 200, 50, seed=0))
    assert torch.equal(windows, text.windows_and_more(long_file, Numbers(), 200, 50, 0, 200)[0])
    other = text.windows(long_file, Numbers(), 200, 50, seed=1)
    assert not torch.equal(windows, other)


@pytest.mark.parametrize(("samples", "seq_len"), [(3, 100_000), (2000, 300)])
def test_windows_of_other_sizes(samples: int, seq_len: int, long_file: Text) -> None:
    windows = text.windows(long_file, Numbers(), samples, seq_len, seed=0)
    assert windows.shape == (samples, seq_len)
    assert torch.equal(windows, windows[:, :1] + torch.arange(seq_len))
    assert len(windows.unique()) == windows.numel()


def test_a_long_file_of_few_tokens(tmp_path: Path) -> None:
    """What is read from one place reaches far into the parts behind it."""
    content = "".join(f"{number}{' ' * 190}" for number in range(1_000_000, 1_024_000))
    source = write(tmp_path / "a.txt", content)
    windows = text.windows(source, Numbers(), 200, 100, seed=0)
    assert windows.shape == (200, 100)
    assert torch.equal(windows, windows[:, :1] + torch.arange(100))
    assert len(windows.unique()) == windows.numel()


@pytest.mark.parametrize("content", ["ü" * 3_000_000, "日本語" * 500_000])
def test_a_long_file_without_gaps(content: str, tmp_path: Path) -> None:
    windows = text.windows(write(tmp_path / "a.txt", content), Letters(), 20, 100, seed=0)
    assert windows.shape == (20, 100)
    joined = ["".join(map(chr, window)) for window in windows]
    assert all(window in content for window in joined)


def test_a_long_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Grüße ".encode("latin-1") * 1_000_000)
    with pytest.raises(OptionError, match="UTF-8") as raised:
        text.windows(Text.named(tmp_path / "a.txt"), Letters(), 20, 100, seed=0)
    assert raised.value.where == str(tmp_path / "a.txt")


def test_a_long_document_is_read_in_part(tmp_path: Path) -> None:
    content = " ".join(map(str, range(1_000_000, 3_000_000)))
    source = write(tmp_path / "a.jsonl", json.dumps({"text": content}))
    tokenizer = Numbers()
    windows = text.windows(source, tokenizer, 100, 50, seed=0)
    assert torch.equal(windows, windows[:, :1] + torch.arange(50))
    assert max(tokenizer.given) <= pieces.LENGTH
    assert sum(tokenizer.given) < (8 << 20) + 2 * pieces.LENGTH


@pytest.mark.parametrize("length", [400, 300_000])
def test_a_file_of_some_pieces_gives_the_windows_of_its_tokens(length: int, tmp_path: Path) -> None:
    """As if all of it were turned into tokens at once."""
    numbers = list(range(1_000_000, 1_000_000 + length))
    source = write(tmp_path / "a.txt", "\n".join(map(str, numbers)))
    generator = random.Random(3)
    whole = length // 17
    chosen = sorted(generator.sample(range(whole), 20))
    offset = generator.randrange(length - whole * 17 + 1)
    want = [numbers[offset + 17 * place : offset + 17 * (place + 1)] for place in chosen]
    assert text.windows(source, Numbers(), 20, 17, seed=3).tolist() == want


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return random_model(configuration("llama"))


def test_generated(model: torch.nn.Module) -> None:
    torch.manual_seed(11)
    want = torch.rand(3)
    torch.manual_seed(11)
    windows = text.generate(model, 7, 12, seed=0, at_once=3)
    assert torch.equal(torch.rand(3), want)  # nobody else's random numbers are touched
    assert windows.shape == (7, 12)
    assert windows.dtype == torch.int64
    assert windows.device.type == "cpu"
    assert (windows[:, 0] == 1).all()  # the begin-of-text token
    assert int(windows.min()) >= 0
    assert int(windows.max()) < VOCABULARY
    assert len({tuple(row) for row in windows.tolist()}) == 7
    told: list[tuple[int, int]] = []
    watched = text.generate(model, 7, 12, seed=0, at_once=3, report=lambda *at: told.append(at))
    assert torch.equal(windows, watched)  # nor does it matter whether anybody is told
    assert told == [(3 * n, 84) for n in range(2, 13)] + [
        (36 + 3 * n, 84) for n in range(2, 13)
    ] + [(72 + n, 84) for n in range(2, 13)]
    assert not torch.equal(windows, text.generate(model, 7, 12, seed=1, at_once=3))
    assert model.training is False


def test_generated_text_follows_the_models_own_distribution() -> None:
    """A head that likes all tokens nearly alike gets nearly all."""
    flat = random_model(configuration("llama"))
    flat.lm_head.weight.data *= 1e-3
    windows = text.generate(flat, 16, 20, seed=0)
    assert len(windows[:, 1:].unique()) > 150  # of 384


@pytest.mark.parametrize(
    "habits",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.1, "min_p": 0.9},
        {"repetition_penalty": 10.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(200))},
        {"eos_token_id": list(range(300))},
        {"max_length": 5},
        {"num_beams": 2},
    ],
    ids=lambda habits: " ".join(habits),
)
def test_how_the_model_is_used_to_write_does_not_count(
    model: torch.nn.Module, habits: dict[str, object]
) -> None:
    want = text.generate(model, 3, 16, seed=0)
    other = random_model(configuration("llama"))
    other.generation_config = GenerationConfig(**habits)
    assert torch.equal(text.generate(other, 3, 16, seed=0), want)


def test_it_goes_on_past_ends_of_text() -> None:
    ends = random_model(configuration("llama", eos_token_id=list(range(300))))
    windows = text.generate(ends, 4, 40, seed=0)
    assert windows.shape == (4, 40)
    assert 0.5 < float((windows[:, 1:] < 300).float().mean()) < 1  # ends are not held back either


def test_without_a_begin_of_text_token() -> None:
    model = random_model(configuration("llama", bos_token_id=None, eos_token_id=7))
    assert (text.generate(model, 3, 4, seed=0)[:, 0] == 7).all()
    model = random_model(configuration("llama", bos_token_id=None, eos_token_id=None))
    assert len(text.generate(model, 16, 4, seed=0)[:, 0].unique()) > 4


def test_the_first_token_counts_where_it_is_the_padding_too() -> None:
    """Two models that differ only in what token 0 embeds as go on differently from token 0."""
    one = random_model(configuration("llama", bos_token_id=0))
    other = random_model(configuration("llama", bos_token_id=0))
    assert torch.equal(text.generate(one, 4, 24, seed=0), text.generate(other, 4, 24, seed=0))
    with torch.no_grad():
        other.get_input_embeddings().weight[0] += 3 * torch.randn_like(
            other.get_input_embeddings().weight[0]
        )
    assert not torch.equal(text.generate(one, 4, 24, seed=0), text.generate(other, 4, 24, seed=0))
