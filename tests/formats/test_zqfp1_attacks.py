"""Hostile and damaged checkpoints: a FormatError each, never another exception."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import zqfp1_reader as reader
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoint import (
    CONFIG,
    INDEX,
    MANIFEST,
    ONE_SHARD,
    TWO_SHARDS,
    Files,
    join_header,
    render,
    seal,
    split_header,
    to_json,
)
from valid_cases import PAIR, codebooks_two, input_offset, lorc, sharded, simple

NAMES = ("../x", "/etc/passwd", "a/b", "..", ".", "", "C:x", "a\\b", "a\0b")


def write(files: Files, folder: Path) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def rule_of(files: Files, folder: Path) -> str:
    write(files, folder)
    with pytest.raises(reader.FormatError) as caught:
        reader.read(folder)
    return caught.value.rule


def with_header(change: Callable[[dict[str, Any], int], Any]) -> Files:
    """A checkpoint whose header `change` has edited in place, or replaced by what it returns."""
    files = render(simple("m2", 4, 3, 11))
    header, data = split_header(files[ONE_SHARD])
    replaced = change(header, len(data))
    files[ONE_SHARD] = join_header(header if replaced is None else replaced, data)
    seal(files)
    return files


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda h, n: h[NORM].update(data_offsets=[0, n]),
        lambda h, n: h[NORM].update(data_offsets=[n, n + 8]),
        lambda h, n: h[NORM].update(data_offsets=[-8, 0]),
        lambda h, n: h[NORM].update(data_offsets=[8, 0]),
        lambda h, n: h[NORM].update(data_offsets=[2**63, 2**63 + 8]),
        lambda h, n: h[NORM].update(data_offsets=[0.0, 8.0]),
        lambda h, n: h[NORM].update(data_offsets=[False, 8]),
        lambda h, n: h[NORM].update(data_offsets=[0]),
        lambda h, n: h[NORM].update(data_offsets="08"),
        lambda h, n: h[NORM].update(shape=[2**40, 2**40]),
        lambda h, n: h[NORM].update(shape=[-4]),
        lambda h, n: h[NORM].update(shape=[True] * 4),
        lambda h, n: h[NORM].update(shape=4),
        lambda h, n: h[NORM].update(dtype="BF17"),
        lambda h, n: h[NORM].update(dtype=["BF16"]),
        lambda h, n: h.update({NORM: None}),
        lambda h, n: h.update({"twice": h[NORM]}),
        lambda h, n: h.update({"__metadata__": {"format": 1}}),
        lambda h, n: h.update({"__metadata__": []}),
        lambda h, n: b"",
        lambda h, n: b"[]",
        lambda h, n: b" {}",
        lambda h, n: b"{",
        lambda h, n: b'{"\xff": 1}',
        lambda h, n: b'{"a": NaN}',
        lambda h, n: b'{"a": {"shape": [' + b"9" * 5000 + b"]}}",
        lambda h, n: b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_headers(tmp_path: Path, change: Callable[[dict[str, Any], int], Any]) -> None:
    assert rule_of(with_header(change), tmp_path) == "bad-shard"


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100])
def test_truncated_shards(tmp_path: Path, length: int) -> None:
    files = render(simple("m2", 4, 3, 11))
    files[ONE_SHARD] = files[ONE_SHARD][:length]
    seal(files)
    assert rule_of(files, tmp_path) == "bad-shard"


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**8 + 1, 482, 0])
def test_header_lengths(tmp_path: Path, length: int) -> None:
    files = render(simple("m2", 4, 3, 11))
    files[ONE_SHARD] = struct.pack("<Q", length) + files[ONE_SHARD][8:]
    seal(files)
    assert rule_of(files, tmp_path) == "bad-shard"


def test_a_header_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = render(simple("m2", 4, 3, 11))
    monkeypatch.setattr(reader, "MAX_HEADER", 100)
    assert rule_of(files, tmp_path) == "bad-shard"


@pytest.mark.parametrize("name", NAMES)
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    files = render(sharded())
    index = json.loads(files[INDEX])
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    assert rule_of(files | {INDEX: to_json(index)}, tmp_path) == "outside-folder"
    manifest = json.loads(files[MANIFEST])
    manifest["shards"][name] = manifest["shards"].pop(TWO_SHARDS[0])
    assert rule_of(files | {MANIFEST: to_json(manifest)}, tmp_path) == "outside-folder"


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800", "none.safetensors"])
def test_names_of_no_file(tmp_path: Path, name: str) -> None:
    files = render(sharded())
    index, manifest = json.loads(files[INDEX]), json.loads(files[MANIFEST])
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    manifest["shards"] = {name: manifest["shards"][TWO_SHARDS[0]]}
    files |= {INDEX: to_json(index), MANIFEST: to_json(manifest)}
    assert rule_of(files, tmp_path) == "missing-file"


def test_a_shard_that_is_a_folder(tmp_path: Path) -> None:
    files = render(simple("m2", 4, 3, 11))
    del files[ONE_SHARD]
    (tmp_path / ONE_SHARD).mkdir()
    assert rule_of(files, tmp_path) == "missing-file"


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    checkpoint = sharded()
    first, second = TWO_SHARDS
    checkpoint.shards[second][NORM] = checkpoint.shards[first][NORM]
    assert rule_of(render(checkpoint), tmp_path) == "bad-shard"


@pytest.mark.parametrize("rule_and_file", [("bad-config", CONFIG), ("bad-manifest", MANIFEST)])
@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b"\xff\xfe", b'{"a": 1, "a": 1}', b'{"a":' * 10**5, b"\0" * 9]
)
def test_json_files(tmp_path: Path, rule_and_file: tuple[str, str], data: bytes) -> None:
    rule, file = rule_and_file
    assert rule_of(render(simple("m2", 4, 3, 11)) | {file: data}, tmp_path) == rule


@pytest.mark.parametrize("data", [b"", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}'])
def test_indices(tmp_path: Path, data: bytes) -> None:
    assert rule_of(render(sharded()) | {INDEX: data}, tmp_path) == "bad-shard"


JUNK: list[Any] = [None, True, -1, 0, 2**70, 1.5, "x", [], [1], {}, {"a": 1}]


@pytest.mark.parametrize("key", ["shape", "rank", "span", "raised_groups", "weight_error"])
@pytest.mark.parametrize("junk", [junk for junk in JUNK if junk not in (0, 1.5, 2**70)], ids=repr)
def test_junk_in_the_manifest(tmp_path: Path, key: str, junk: Any) -> None:
    files = render(simple("m2", 4, 3, 11))
    manifest = json.loads(files[MANIFEST])
    (layer,) = manifest["layers"].values()
    layer[key] = junk
    assert rule_of(files | {MANIFEST: to_json(manifest)}, tmp_path) == "bad-manifest"


@pytest.mark.parametrize("junk", [*JUNK, math.nan, math.inf, 10**400, [[]], -0.5], ids=repr)
def test_junk_in_the_codebooks(tmp_path: Path, junk: Any) -> None:
    for books in (junk, [junk], [[*PAIR[0][:7], junk]], [PAIR[0], [junk, *PAIR[1][1:]]]):
        if books == PAIR:
            continue  # 0 where it belongs
        checkpoint = codebooks_two()
        checkpoint.settings["weights"]["codebooks"] = books
        assert rule_of(render(checkpoint), tmp_path) == "bad-config"


@pytest.mark.parametrize("zero", [0, 0.0, -0.0], ids=repr)
def test_the_zero_of_a_codebook_has_no_sign(tmp_path: Path, zero: float) -> None:
    checkpoint = codebooks_two()
    checkpoint.settings["weights"]["codebooks"] = [[zero, *book[1:]] for book in PAIR]
    write(render(checkpoint), tmp_path)
    for layer in reader.read(tmp_path).layers.values():
        for book in layer.books:
            assert [math.copysign(1, value) for value in book] == [1] * 8 + [-1] * 8


MADE = (lorc("e4m3"), input_offset(), codebooks_two(), sharded())
WHOLE = [render(checkpoint) for checkpoint in MADE]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_random_damage_is_taken_or_refused_by_name(data: st.DataObject) -> None:
    files = dict(data.draw(st.sampled_from(WHOLE)))
    name = data.draw(st.sampled_from(sorted(files)))
    text = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text) - 1))
        length = data.draw(st.integers(0, 4))
        junk = st.binary(max_size=4) | st.sampled_from([b'"', b"{", b"null", b"-1", b"1e999"])
        text[start : start + length] = data.draw(junk)
    files[name] = bytes(text)
    if name.endswith(".safetensors"):
        seal(files)
    with TemporaryDirectory() as folder:
        write(files, Path(folder))
        try:
            checkpoint = reader.read(folder)
        except reader.FormatError:
            return
        for layer in checkpoint.layers.values():
            assert len(layer.dequantize()) == layer.shape[0] * layer.shape[1]
            layer.lorc()
